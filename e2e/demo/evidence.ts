/** What the kernel and the disk say about a container's root file system. */
import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs';
import path from 'node:path';
import { type MountLine, mountTable } from '../harness/mounts.ts';
import { bytes } from './narrator.ts';

/** The line of a process's mount table for "/". */
export function rootMount(pid: number): MountLine {
  const line = mountTable(pid).findLast((candidate) => candidate.mountPoint === '/');
  if (line === undefined) throw new Error(`process ${pid} has no root mount`);
  return line;
}

/** As mount(8) prints it; paths shortened by the private root's. */
export function describeMount(line: MountLine, privateRoot: string): string {
  const part = line.root === '/' ? '' : `, directory ${line.root}`;
  const isPath = (option: string): boolean => /^(lower|upper|work)dir/.test(option);
  const options = new Set([...line.options, ...line.superOptions.filter((option) => !isPath(option))]);
  const dirs = line.superOptions.filter(isPath).map((option) => `, ${option}`);
  const text = `/ is ${line.fsType} on ${line.source}${part} (${[...options].join(',')})${dirs.join('')}`;
  return text.replaceAll(privateRoot, '…');
}

/** The device in the way of lsblk: size, access, direct I/O. null when the mount has no block device below it. */
export function describeDevice(major: number, minor: number): string | null {
  const dir = `/sys/dev/block/${major}:${minor}`;
  if (!existsSync(dir)) return null;
  const read = (name: string): string => readFileSync(path.join(dir, name), 'utf8').trim();
  const name = /^DEVNAME=(.+)$/m.exec(read('uevent'))?.[1] ?? '?';
  const access = read('ro') === '1' ? 'read-only' : 'read-write';
  const dio = existsSync(path.join(dir, 'loop')) && read('loop/dio') === '1' ? ', direct I/O' : '';
  const sector = read('queue/logical_block_size');
  // The unit of this file is 512 bytes whatever the sector size.
  return `/dev/${name} ${major}:${minor}, ${bytes(Number(read('size')) * 512)}, ${access}, ${sector}-byte sectors${dio}`;
}

/** What a directory takes on disk: allocated blocks, not apparent sizes. */
export function diskUsage(dir: string): number {
  return readdirSync(dir, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .reduce((sum, entry) => sum + statSync(path.join(entry.parentPath, entry.name)).blocks * 512, 0);
}
