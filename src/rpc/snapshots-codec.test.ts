// Invariants: what enters is checked once and completely; nanoseconds survive; empty label values are no labels; whatever
// else a message carries is ignored.
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { create, fromBinary, type MessageInitShape, toBinary } from '@bufbuild/protobuf';
import fc from 'fast-check';
import { ErrorKind } from '../base/errors.ts';
import {
  CommitSnapshotRequestSchema,
  InfoSchema,
  PrepareSnapshotRequestSchema,
  UpdateSnapshotRequestSchema,
} from '../gen/services/snapshots/v1/snapshots_pb.js';
import { Kind, type SnapshotInfo } from '../worker/worker.ts';
import {
  commitRequestOf,
  kKeyMaxBytes,
  kLabelMaxBytes,
  labelsOf,
  nanosecondsOf,
  prepareRequestOf,
  timestampOf,
  updateRequestOf,
  wireInfoOf,
  wireSizeMax,
} from './snapshots-codec.ts';

const prepare = (message: MessageInitShape<typeof PrepareSnapshotRequestSchema>) =>
  prepareRequestOf(create(PrepareSnapshotRequestSchema, message));
const invalid = { name: 'SnapshotterError', kind: ErrorKind.InvalidArgument };

describe('snapshots codec', () => {
  it('takes keys as they are: spaces, slashes, any script, 1 KiB', () => {
    for (const key of ['k8s.io/1/extract-9-QmG- sha256:49a8', '/abs', 'ключ 日本 🙂', '..', 'k'.repeat(kKeyMaxBytes)]) {
      assert.equal(prepare({ key }).key, key);
    }
  });

  it('refuses keys that are empty, too long or hold a NUL', () => {
    for (const key of ['', 'k'.repeat(kKeyMaxBytes + 1), '日'.repeat(kKeyMaxBytes / 3 + 1), 'a\0b']) {
      assert.throws(() => prepare({ key }), invalid);
    }
    assert.throws(() => prepare({ key: 'k', parent: 'a\0b' }), invalid);
    assert.throws(() => commitRequestOf(create(CommitSnapshotRequestSchema, { key: 'k' })), invalid);
  });

  it('drops labels without value and keeps the rest, also with odd keys', () => {
    const labels = Object.fromEntries([
      ['a', '1'],
      ['empty', ''],
      ['constructor', 'x'],
    ]);
    assert.deepEqual(prepare({ key: 'k', labels }).labels, { a: '1', constructor: 'x' });
  });

  it('counts a label in bytes, key and value together', () => {
    const fits = { k: 'v'.repeat(kLabelMaxBytes - 1) };
    assert.deepEqual(labelsOf('s1', fits), fits);
    assert.throws(() => labelsOf('s1', { k: 'v'.repeat(kLabelMaxBytes) }), invalid);
    assert.throws(() => labelsOf('s1', { 日: '本'.repeat(1365) }), invalid);
    assert.throws(() => labelsOf('s1', { '': 'v' }), invalid);
    assert.throws(() => labelsOf('s1', { 'k\0': 'v' }), /s1: label/);
    assert.throws(() => labelsOf('s1', { 'k\0': 'v' }), invalid);
    assert.throws(() => labelsOf('s1', { k: 'v\0' }), invalid);
  });

  it("takes Go's zero time in an update, and ignores all of info but name and labels", () => {
    const zero = { seconds: -62135596800n, nanos: 0 };
    const message = create(UpdateSnapshotRequestSchema, {
      info: { name: 'n', parent: 'p', kind: 3, createdAt: zero, updatedAt: zero, labels: { a: '1', b: '' } },
      updateMask: { paths: ['labels.a', 'labels.b'] },
    });
    const again = fromBinary(UpdateSnapshotRequestSchema, toBinary(UpdateSnapshotRequestSchema, message));
    assert.deepEqual(updateRequestOf(again), { name: 'n', labels: { a: '1' }, paths: ['labels.a', 'labels.b'] });
    assert.throws(() => updateRequestOf(create(UpdateSnapshotRequestSchema)), invalid);
  });

  it('gives nanoseconds back to the last one, before the epoch too', () => {
    fc.assert(
      fc.property(fc.bigInt({ min: -62135596800n * 10n ** 9n, max: 253402300799n * 10n ** 9n }), (nanoseconds) => {
        const timestamp = timestampOf(nanoseconds);
        assert.ok(timestamp.nanos >= 0 && timestamp.nanos < 1e9);
        assert.equal(nanosecondsOf(timestamp), nanoseconds);
      }),
    );
  });

  it('never underestimates an encoded info', () => {
    const text = fc.string({ unit: 'binary', maxLength: 50 }).map((value) => value.toWellFormed());
    fc.assert(
      fc.property(text, text, fc.dictionary(text, text), (name, parent, labels) => {
        const info: SnapshotInfo = {
          kind: Kind.Active,
          name,
          parent,
          labels,
          createdAt: 2n ** 62n,
          updatedAt: 2n ** 62n,
        };
        assert.ok(toBinary(InfoSchema, wireInfoOf(info)).length <= wireSizeMax(info));
      }),
    );
  });
});
