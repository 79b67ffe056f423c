/** Invariants: the table of kinds and the addon's codes are the same set; context is put in front and the kind kept. */
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import { loadNative, nativePath } from './native.ts';
import { errnoOf, fromNative, kKindOfCode } from './native-errors.ts';

describe('errors of the addon', () => {
  const native = loadNative(nativePath());

  it('have a kind for each code the addon can give, and no others', () => {
    assert.deepEqual(Object.keys(kKindOfCode).toSorted(), [...native.codes].toSorted());
  });

  it('keep kind, text and errno', async () => {
    const error = await native.inspectLayer('/absent').then(
      () => assert.fail('an absent layer was inspected'),
      (reason: unknown) => reason,
    );
    assert.equal(errnoOf(error), 2);
    const failure = fromNative('inspect', error);
    assert.equal(failure.kind, ErrorKind.NotFound);
    assert.match(failure.message, /^inspect: .*\/absent.*No such file/);
  });

  it('are Internal when they are not of the addon', () => {
    const bug: Error & { code?: string } = new TypeError('oops');
    assert.equal(fromNative('x', bug).kind, ErrorKind.Internal);
    bug.code = 'toString';
    assert.equal(fromNative('x', bug).kind, ErrorKind.Internal);
    assert.equal(fromNative('x', 'text').message, 'x: text');
    assert.equal(fromNative('x', new SnapshotterError(ErrorKind.DataLoss, 'y')).kind, ErrorKind.DataLoss);
  });

  it('answer arguments of a wrong type with invalid-argument', async () => {
    const wrong = native as unknown as Record<string, (...args: unknown[]) => Promise<unknown>>;
    for (const [name, ...args] of [
      ['inspectLayer', 7],
      ['inspectLayer', 'a\0b'],
      ['createUpper', null],
      ['createUpper', { data: '/x', index: '/y', virtualSizeBytes: -1n, sparse: false, parentUuid: null }],
      ['createUpper', { data: '/x', index: '/y', virtualSizeBytes: 512n, sparse: false, parentUuid: 'no' }],
      ['mount', 'tmpfs', 'tmpfs', '/x', ['ok', 1]],
      ['diskUsage', '/x'],
      ['attachDevice', {}],
      ['releaseStaleDevices', ''],
      ['mountTable', '../1'],
    ] as const) {
      await assert.rejects(async () => wrong[name]?.(...args), { code: 'invalid-argument' }, `${name}`);
    }
    assert.throws(() => native.peerCredentials(-1), { code: 'invalid-argument' });
  });
});
