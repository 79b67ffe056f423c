/** `fs[;mount options[;mkfs options]]`: how a file system is made and mounted. The text comes from the configuration
 * (`defaultFsType`) and from the label blob-fs-type. Mount options are separated by commas, mkfs options by white space.
 * A missing part means the defaults of that file system, an empty one means none. */
import { ErrorKind, SnapshotterError } from './errors.ts';

export interface FsDescriptor {
  readonly type: string;
  readonly mountOptions: readonly string[];
  readonly mkfsOptions: readonly string[];
}

interface Defaults {
  readonly mountOptions: string;
  readonly mkfsOptions: string;
}

/** The original's, but for xfs: it asks for `-l size=4m -m crc=0`, which xfsprogs refuses since 6.0 ("log size must be at
 * least 64MB") and kernels without CONFIG_XFS_SUPPORT_V4 do not mount. The smallest log keeps images small. */
export const fsDefaults: Readonly<Record<string, Defaults>> = {
  ext4: { mountOptions: 'discard', mkfsOptions: '-O ^has_journal,sparse_super,flex_bg -G 1 -E discard -F' },
  xfs: { mountOptions: 'nouuid,discard', mkfsOptions: '-f -l size=64m' },
  f2fs: { mountOptions: '', mkfsOptions: '-S -w 4096' },
  ntfs: { mountOptions: '', mkfsOptions: '-F -f' },
  erofs: { mountOptions: '', mkfsOptions: '' },
};

const kTextMaxChars = 4096;

/** Errors: InvalidArgument. */
export function parseFsDescriptor(text: string): FsDescriptor {
  const refuse = (reason: string): never => {
    throw new SnapshotterError(
      ErrorKind.InvalidArgument,
      `file system ${JSON.stringify(text.slice(0, 256))}: ${reason}`,
    );
  };
  if (text.length > kTextMaxChars) refuse(`longer than ${kTextMaxChars} characters`);
  if (text.includes('\0') || text.includes('\n')) refuse('contains a NUL or a line break');
  const [first = '', mountText, mkfsText, ...rest] = text.split(';');
  if (rest.length > 0) refuse('more than three parts');
  const type = first.trim();
  // It becomes part of a program's name (mkfs.<type>) and a file system type of mount(2).
  if (!/^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$/.test(type)) refuse('the first part must name a file system');
  const defaults = (Object.hasOwn(fsDefaults, type) ? fsDefaults[type] : undefined) ?? {
    mountOptions: '',
    mkfsOptions: '',
  };
  return {
    type,
    mountOptions: split(mountText ?? defaults.mountOptions, ','),
    mkfsOptions: split(mkfsText ?? defaults.mkfsOptions, /\s+/),
  };
}

function split(text: string, separator: string | RegExp): readonly string[] {
  return text
    .split(separator)
    .map((part) => part.trim())
    .filter((part) => part !== '');
}
