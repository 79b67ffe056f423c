/** A small image for tests, and the busybox root that other images start from. Busybox is the machine's own static
 * one. */
import { chmodSync, copyFileSync, linkSync, mkdirSync, symlinkSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { run } from '../harness/processes.ts';
import { type CachedImage, cached, recipeKey, writeImage } from './oci.ts';

/** What is to be seen in `/` of the image beside the busybox root: path to content, null = must not exist. */
export const busyboxContents: Readonly<Record<string, string | null>> = {
  '/hello': 'hello from layer 3\n',
  '/layer1': 'one\n',
  '/layer2': 'two\n',
  '/linked': 'two\n',
  '/removed': null,
  '/opaque/below': null,
  '/opaque/above': 'above\n',
  '/dir/kept': 'kept\n',
  '/dir/removed': null,
  '/dir/ein Leerzeichen und ü': 'unicode\n',
};

/** Three layers: base with files to lose; whiteouts, an opaque directory, links, a set-uid file; one file replaced. */
export function busyboxImage(): Promise<CachedImage> {
  const sources = ['oci.ts', 'busybox.ts'].map((file) => path.join(import.meta.dirname, file));
  return cached(recipeKey('busybox', sources), async (layout, scratch) => {
    const [one, two, three] = ['one', 'two', 'three'].map((name) => path.join(scratch, name)) as [
      string,
      string,
      string,
    ];
    await makeBase(one);
    writeTree(one, {
      hello: 'hello from layer 1\n',
      layer1: 'one\n',
      removed: 'gone\n',
      'opaque/below': 'gone\n',
      'dir/kept': 'kept\n',
      'dir/removed': 'gone\n',
    });
    writeTree(two, {
      layer2: 'two\n',
      '.wh.removed': '',
      'opaque/.wh..wh..opq': '',
      'opaque/above': 'above\n',
      'dir/.wh.removed': '',
      'dir/ein Leerzeichen und ü': 'unicode\n',
      setuid: '#!/bin/sh\n',
    });
    linkSync(path.join(two, 'layer2'), path.join(two, 'linked'));
    symlinkSync('layer2', path.join(two, 'symlink'));
    chmodSync(path.join(two, 'setuid'), 0o4755);
    writeTree(three, { hello: 'hello from layer 3\n' });
    await writeImage(layout, { layers: [{ tree: one }, { tree: two }, { tree: three }], cmd: ['/bin/sh'] });
  });
}

/** A busybox root: applets as links, accounts, the usual empty directories. */
export async function makeBase(root: string): Promise<void> {
  for (const dir of ['bin', 'dev', 'etc', 'proc', 'root', 'run', 'sys', 'tmp', 'var/lib']) {
    mkdirSync(path.join(root, dir), { recursive: true });
  }
  chmodSync(path.join(root, 'tmp'), 0o1777);
  const busybox = path.join(root, 'bin/busybox');
  copyFileSync('/bin/busybox', busybox);
  for (const applet of (await run(busybox, ['--list'])).trim().split('\n')) {
    if (applet !== 'busybox') symlinkSync('busybox', path.join(root, 'bin', applet));
  }
  writeFileSync(path.join(root, 'etc/passwd'), 'root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1::/:/bin/false\n');
  writeFileSync(path.join(root, 'etc/group'), 'root:x:0:\ndaemon:x:1:\n');
}

function writeTree(root: string, files: Readonly<Record<string, string>>): void {
  for (const [name, content] of Object.entries(files)) {
    const file = path.join(root, name);
    mkdirSync(path.dirname(file), { recursive: true });
    writeFileSync(file, content);
  }
}
