// Invariants: what a label asks for reaches mkfs unchanged; what we add only says that the device is empty; a superblock
// made by the real program is recognised.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, it } from 'node:test';
import fc from 'fast-check';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import { formatDevice, mkfsArguments } from './mkfs.ts';
import { fileSystemOf, probeFileSystem } from './probe.ts';
import { makeScratch } from './scratch.test.ts';

const args = (type: string, ...mkfsOptions: string[]) => mkfsArguments({ type, mountOptions: [], mkfsOptions });

describe('mkfs', () => {
  it('is told that the device reads as zeros, beside the options it was given', () => {
    assert.deepEqual(args('ext4', '-O', '^has_journal', '-E', 'discard', '-F'), [
      '-O',
      '^has_journal',
      '-E',
      'discard,assume_storage_prezeroed=1',
      '-F',
    ]);
    assert.deepEqual(args('ext4'), ['-E', 'assume_storage_prezeroed=1']);
  });

  it('keeps its hands off when a label decides about inode tables', () => {
    assert.deepEqual(args('ext4', '-E', 'lazy_itable_init=0'), ['-E', 'lazy_itable_init=0']);
  });

  it('makes today’s xfs where the descriptor means the default of old', () => {
    assert.deepEqual(args('xfs', '-f', '-l', 'size=4m', '-m', 'crc=0'), ['-f']);
    assert.deepEqual(args('xfs', '-f', '-m', 'crc=0'), ['-f', '-m', 'crc=0']);
  });

  it('of a type that is no word runs nothing', async () => {
    const nobody = { mount: () => Promise.resolve(), unmount: () => Promise.resolve() };
    for (const type of ['', '../../bin/sh', 'ext4 -F', 'EXT4', 'a'.repeat(17)]) {
      await assert.rejects(
        formatDevice(nobody, '/dev/null', { type, mountOptions: [], mkfsOptions: [] }, '/nonesuch'),
        (error) => error instanceof SnapshotterError && error.kind === ErrorKind.InvalidArgument,
      );
    }
  });
});

describe('a probe', () => {
  for (const [type, program, ...options] of [
    ['ext4', 'mkfs.ext4', '-q', '-F', '-O', '^has_journal,sparse_super,flex_bg', '-G', '1'],
    ['ext4', 'mkfs.ext4', '-q', '-F'],
    ['ext3', 'mkfs.ext3', '-q', '-F'],
    ['ext2', 'mkfs.ext2', '-q', '-F'],
    ['xfs', 'mkfs.xfs', '-q', '-f'],
  ] as const) {
    it(`recognises ${type} made by ${[program, ...options].join(' ')}`, async (t) => {
      const image = join(makeScratch(t), 'image');
      writeFileSync(image, '');
      truncateSync(image, 1 << 30);
      execFileSync(program, [...options, image], { stdio: 'ignore' });
      assert.equal(await probeFileSystem(image), type);
    });
  }

  it('recognises the others by their magic', () => {
    for (const [type, offset, bytes] of [
      ['erofs', 1024, [0xe2, 0xe1, 0xf5, 0xe0]],
      ['f2fs', 1024, [0x10, 0x20, 0xf5, 0xf2]],
      ['ntfs', 3, [...Buffer.from('NTFS    ')]],
      ['btrfs', 0x10040, [...Buffer.from('_BHRfS_M')]],
    ] as const) {
      const start = Buffer.alloc(0x11000);
      start.set(bytes, offset);
      assert.equal(fileSystemOf(start), type);
    }
  });

  it('finds nothing on an empty device, on a tiny one, and never fails on noise', () => {
    assert.equal(fileSystemOf(Buffer.alloc(0x11000)), null);
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 3000 }), (bytes) => {
        fileSystemOf(Buffer.from(bytes));
      }),
    );
  });

  it('of a device that is gone says NotFound', async () => {
    await assert.rejects(
      probeFileSystem('/dev/overlaybd-nonesuch'),
      (error) => error instanceof SnapshotterError && error.kind === ErrorKind.NotFound,
    );
  });
});
