/** What a client does with the mounts it is given, and what the kernel says about it. */
import { mkdirSync, readFileSync } from 'node:fs';
import type { Mount } from '../../src/worker/worker.ts';
import { run } from './processes.ts';
import type { Workdir } from './workdir.ts';

export interface MountLine {
  readonly id: number;
  readonly parentId: number;
  readonly major: number;
  readonly minor: number;
  /** The part of the file system that is mounted. */
  readonly root: string;
  readonly mountPoint: string;
  readonly options: readonly string[];
  readonly fsType: string;
  readonly source: string;
  readonly superOptions: readonly string[];
}

/** The mount table of a process (default: ours), octal escapes decoded, in mount order. */
export function mountTable(pid: number | 'self' = 'self'): readonly MountLine[] {
  return readFileSync(`/proc/${pid}/mountinfo`, 'utf8')
    .split('\n')
    .filter((line) => line !== '')
    .map(parseMountLine);
}

function parseMountLine(line: string): MountLine {
  const fields = line.split(' ');
  // After the sixth field come optional ones, ended by "-".
  const dash = fields.indexOf('-', 6);
  const at = (index: number): string => fields[index] ?? '';
  const [major = '0', minor = '0'] = at(2).split(':');
  return {
    id: Number(at(0)),
    parentId: Number(at(1)),
    major: Number(major),
    minor: Number(minor),
    root: unescapeOctal(at(3)),
    mountPoint: unescapeOctal(at(4)),
    options: at(5).split(','),
    fsType: at(dash + 1),
    source: unescapeOctal(at(dash + 2)),
    superOptions: at(dash + 3)
      .split(',')
      .map(unescapeOctal),
  };
}

function unescapeOctal(text: string): string {
  return text.replaceAll(/\\([0-7]{3})/g, (_, digits: string) => String.fromCharCode(Number.parseInt(digits, 8)));
}

/** Whatever is mounted at or below the directory, innermost last. */
export function mountsBelow(dir: string): readonly MountLine[] {
  return mountTable().filter((line) => line.mountPoint === dir || line.mountPoint.startsWith(`${dir}/`));
}

/** mount(8) with exactly the given type, source and options; several are stacked in order on the same target. */
export async function mount(mounts: readonly Mount[], target: string): Promise<void> {
  mkdirSync(target, { recursive: true });
  for (const { type, source, options } of mounts) {
    // "bind" is a flag, not a file system: mount(8) takes it from the options.
    const typeArgs = type === 'bind' ? [] : ['-t', type];
    const all =
      type === 'bind' && !options.some((option) => option === 'bind' || option === 'rbind')
        ? ['bind', ...options]
        : options;
    await run('mount', [...typeArgs, ...(all.length > 0 ? ['-o', all.join(',')] : []), source, target]);
  }
}

/** Unmounts everything stacked at the target. Not mounted = success. */
export async function unmount(target: string): Promise<void> {
  while (mountTable().some((line) => line.mountPoint === target)) {
    await run('umount', [target]);
  }
}

/** Mounted for the life of the returned object, and undone with the work directory at the latest. */
export async function mounted(
  work: Workdir,
  mounts: readonly Mount[],
  target: string,
): Promise<AsyncDisposable & { readonly path: string }> {
  await mount(mounts, target);
  const undo = (): Promise<void> => unmount(target);
  work.defer(`unmount ${target}`, undo);
  return { path: target, [Symbol.asyncDispose]: undo };
}
