/** Which file system a device holds, by the magic numbers of superblocks. */
import { open } from 'node:fs/promises';
import { fromIo, withDeadline } from './io-errors.ts';

const kProbeTimeoutMs = 10_000;
/** Everything looked at lies in the first 64 KiB and one block. */
const kProbeBytes = 0x11000;

interface Magic {
  readonly type: string;
  readonly offset: number;
  readonly bytes: Buffer;
}

const kMagics: readonly Magic[] = [
  { type: 'xfs', offset: 0, bytes: Buffer.from('XFSB', 'latin1') },
  { type: 'ntfs', offset: 3, bytes: Buffer.from('NTFS    ', 'latin1') },
  { type: 'squashfs', offset: 0, bytes: Buffer.from('hsqs', 'latin1') },
  { type: 'erofs', offset: 1024, bytes: Buffer.from([0xe2, 0xe1, 0xf5, 0xe0]) },
  { type: 'f2fs', offset: 1024, bytes: Buffer.from([0x10, 0x20, 0xf5, 0xf2]) },
  { type: 'btrfs', offset: 0x10040, bytes: Buffer.from('_BHRfS_M', 'latin1') },
];

const kExtMagicOffset = 1024 + 56;
const kExtMagic = 0xef53;
const kExtCompatOffset = 1024 + 92;
const kExtIncompatOffset = 1024 + 96;
const kExtRoCompatOffset = 1024 + 100;
const kCompatHasJournal = 0x4;
/** What ext3 knows; any other feature makes it ext4. */
const kExt3Incompat = 0x2 | 0x4 | 0x10; // filetype, recover, meta_bg
const kExt3RoCompat = 0x1 | 0x2 | 0x4; // sparse_super, large_file, btree_dir

/** null = none known. A device is served by another process, so reading it here cannot lock us up; the deadline covers a
 * server that hangs. */
export async function probeFileSystem(devicePath: string): Promise<string | null> {
  const context = `probe ${devicePath}`;
  try {
    return fileSystemOf(await withDeadline(context, kProbeTimeoutMs, readStart(devicePath)));
  } catch (error) {
    throw fromIo(context, error);
  }
}

async function readStart(path: string): Promise<Buffer> {
  const file = await open(path, 'r');
  try {
    const start = Buffer.alloc(kProbeBytes);
    let length = 0;
    while (length < start.length) {
      const { bytesRead } = await file.read(start, length, start.length - length, length);
      if (bytesRead === 0) break;
      length += bytesRead;
    }
    return start.subarray(0, length);
  } finally {
    await file.close();
  }
}

/** `start`: the first bytes of the device, at least 68 KiB unless it is smaller. */
export function fileSystemOf(start: Buffer): string | null {
  for (const { type, offset, bytes } of kMagics) {
    if (start.subarray(offset, offset + bytes.length).equals(bytes)) return type;
  }
  if (start.length < kExtRoCompatOffset + 4 || start.readUInt16LE(kExtMagicOffset) !== kExtMagic) return null;
  const incompat = start.readUInt32LE(kExtIncompatOffset);
  const roCompat = start.readUInt32LE(kExtRoCompatOffset);
  if ((incompat & ~kExt3Incompat) !== 0 || (roCompat & ~kExt3RoCompat) !== 0) return 'ext4';
  return (start.readUInt32LE(kExtCompatOffset) & kCompatHasJournal) !== 0 ? 'ext3' : 'ext2';
}
