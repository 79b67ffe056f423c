// Invariants: a missing part means defaults, an empty one none; whatever the text, the outcome is a descriptor or
// InvalidArgument; no part can name a program outside mkfs.*.
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import fc from 'fast-check';
import { ErrorKind, SnapshotterError } from './errors.ts';
import { parseFsDescriptor } from './fs-descriptor.ts';

const ext4Mkfs = ['-O', '^has_journal,sparse_super,flex_bg', '-G', '1', '-E', 'discard', '-F'];

const accepted: readonly [text: string, type: string, mountOptions: string[], mkfsOptions: string[]][] = [
  ['ext4', 'ext4', ['discard'], ext4Mkfs],
  ['ext4;', 'ext4', [], ext4Mkfs],
  ['ext4;;', 'ext4', [], []],
  ['ext4;noatime,discard', 'ext4', ['noatime', 'discard'], ext4Mkfs],
  ['ext4;noatime;-b 1024  -F', 'ext4', ['noatime'], ['-b', '1024', '-F']],
  [' xfs ', 'xfs', ['nouuid', 'discard'], ['-f', '-l', 'size=64m']],
  ['xfs;nouuid;', 'xfs', ['nouuid'], []],
  ['f2fs', 'f2fs', [], ['-S', '-w', '4096']],
  ['ntfs', 'ntfs', [], ['-F', '-f']],
  ['erofs', 'erofs', [], []],
  ['btrfs', 'btrfs', [], []],
  ['constructor', 'constructor', [], []],
];
const refused = [
  '',
  ';',
  ';discard',
  'ext4;a;b;c',
  '../ext4',
  'ext4/x',
  '-F',
  'ext 4',
  'ext4\0',
  'ext4;a\nb',
  'x'.repeat(40),
];

describe('file system descriptor', () => {
  for (const [text, type, mountOptions, mkfsOptions] of accepted) {
    it(`reads ${JSON.stringify(text)}`, () => {
      assert.deepEqual(parseFsDescriptor(text), { type, mountOptions, mkfsOptions });
    });
  }
  for (const text of refused) {
    it(`refuses ${JSON.stringify(text)}`, () => {
      assert.throws(() => parseFsDescriptor(text), { name: 'SnapshotterError', kind: ErrorKind.InvalidArgument });
    });
  }
  it('never throws anything else', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'binary' }), (text) => {
        try {
          const { type } = parseFsDescriptor(text);
          assert.match(type, /^[A-Za-z0-9][A-Za-z0-9_-]*$/);
        } catch (error) {
          assert.ok(error instanceof SnapshotterError && error.kind === ErrorKind.InvalidArgument);
        }
      }),
    );
  });
});
