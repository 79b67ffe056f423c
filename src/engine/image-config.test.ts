// Invariants: what is written is read back; keys that are not ours survive; a file that is no config is DataLoss with its
// path in the text, never a crash.
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import fc from 'fast-check';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import type { ImageConfig } from './engine.ts';
import { formatImageConfig, parseImageConfig } from './image-config.ts';

const optional = <T>(value: fc.Arbitrary<T>) => fc.option(value, { nil: undefined });
const lower = fc
  .record({
    file: optional(fc.string()),
    dir: optional(fc.string()),
    digest: optional(fc.string()),
    size: optional(fc.nat()),
  })
  .map((entry) => Object.fromEntries(Object.entries(entry).filter(([, value]) => value !== undefined)));
const name = fc.string({ minLength: 1 });
const plain = { noNullPrototype: true };
const config: fc.Arbitrary<ImageConfig> = fc.record(
  {
    repoBlobUrl: fc.string(),
    lowers: fc.array(lower),
    upper: fc.option(fc.record({ data: name, index: name, vsize: fc.nat() }, plain)),
    resultFile: fc.string(),
  },
  plain,
);

describe('an image config', () => {
  it('is read back as it was written', () => {
    fc.assert(
      fc.property(config, (value) => {
        assert.deepEqual(parseImageConfig('c', formatImageConfig(value, null)), value);
      }),
      { numRuns: 500 },
    );
  });

  it('without an upper is written with an empty one, as the original does', () => {
    const text = formatImageConfig({ repoBlobUrl: '', lowers: [], upper: null, resultFile: '/r' }, null);
    assert.deepEqual(JSON.parse(text), { repoBlobUrl: '', lowers: [], upper: {}, resultFile: '/r' });
  });

  it('keeps the keys that others added, at the top, in a lower and in the upper', () => {
    const before = JSON.stringify({
      repoBlobUrl: 'old',
      lowers: [
        { dir: '/a', targetFile: '/a/layer.tar' },
        { dir: '/b', gzipIndex: '/b/gzip.meta' },
      ],
      upper: { index: 'i', data: 'd', target: 't' },
      resultFile: '/r',
      download: { enable: true },
      recordTracePath: '/trace',
    });
    const after = parseImageConfig('c', before);
    const text = formatImageConfig({ ...after, repoBlobUrl: 'new', lowers: [{ dir: '/b', size: 1 }] }, before);
    assert.deepEqual(JSON.parse(text), {
      repoBlobUrl: 'new',
      lowers: [{ dir: '/b', gzipIndex: '/b/gzip.meta', size: 1 }],
      upper: { index: 'i', data: 'd', target: 't' },
      resultFile: '/r',
      download: { enable: true },
      recordTracePath: '/trace',
    });
  });

  it('hands a lower’s unknown keys to whoever builds a child from it', () => {
    const parsed = parseImageConfig('c', '{"lowers":[{"dir":"/a","targetDigest":"sha256:1"}]}');
    assert.deepEqual(parsed.lowers, [{ dir: '/a', targetDigest: 'sha256:1' }]);
  });

  it('with half an upper is read-only', () => {
    assert.equal(parseImageConfig('c', '{"upper":{"data":"d"}}').upper, null);
  });

  for (const [what, text] of [
    ['nothing', ''],
    ['half a file', '{"lowers":['],
    ['a list', '[]'],
    ['null', 'null'],
    ['lowers of another type', '{"lowers":{}}'],
    ['a size that is text', '{"lowers":[{"size":"12"}]}'],
    ['a negative size', '{"lowers":[{"size":-1}]}'],
    ['a path that is a number', '{"resultFile":7}'],
  ] as const) {
    it(`made of ${what} is DataLoss and names its path`, () => {
      assert.throws(
        () => parseImageConfig('/s/1/config.v1.json', text),
        (error) =>
          error instanceof SnapshotterError &&
          error.kind === ErrorKind.DataLoss &&
          error.message.includes('/s/1/config.v1.json'),
      );
    });
  }

  it('never throws anything but our error, whatever the bytes', () => {
    fc.assert(
      fc.property(fc.oneof(fc.json(), fc.string()), (text) => {
        try {
          parseImageConfig('c', text);
        } catch (error) {
          assert.ok(error instanceof SnapshotterError);
        }
        formatImageConfig({ repoBlobUrl: '', lowers: [], upper: null, resultFile: '' }, text);
      }),
      { numRuns: 500 },
    );
  });
});
