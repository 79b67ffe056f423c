/** What a directory tree holds, for comparing. */
import { createHash } from 'node:crypto';
import { lstatSync, readdirSync, readFileSync, readlinkSync } from 'node:fs';
import path from 'node:path';

export type Tree = ReadonlyMap<string, string>;

/** Path → one line of type, mode, owner, and content digest or link target. lost+found is not content. */
export function treeOf(root: string): Tree {
  const tree = new Map<string, string>();
  const walk = (dir: string): void => {
    for (const name of readdirSync(path.join(root, dir)).sort()) {
      const relative = path.posix.join(dir, name);
      if (relative === 'lost+found') continue;
      const full = path.join(root, relative);
      const stat = lstatSync(full);
      const owner = `${(stat.mode & 0o7777).toString(8)} ${stat.uid}:${stat.gid}`;
      if (stat.isDirectory()) {
        tree.set(relative, `directory ${owner}`);
        walk(relative);
      } else if (stat.isSymbolicLink()) tree.set(relative, `link ${readlinkSync(full)}`);
      else if (stat.isFile()) tree.set(relative, `file ${owner} ${sha256(readFileSync(full))}`);
      else tree.set(relative, `special ${stat.mode.toString(8)} ${stat.rdev} ${owner}`);
    }
  };
  walk('');
  return tree;
}

export const sha256 = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex');
