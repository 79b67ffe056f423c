/** The version of this package, from the package.json above this file: the source tree, build/js and an installation all
 * have one at different depths. */
import { existsSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';

export function packageVersion(): string {
  for (let directory = import.meta.dirname; ; directory = dirname(directory)) {
    const path = join(directory, 'package.json');
    if (existsSync(path)) {
      const { version } = JSON.parse(readFileSync(path, 'utf8')) as { version?: unknown };
      if (typeof version === 'string') return version;
    }
    if (directory === dirname(directory)) throw new Error(`no package.json above ${import.meta.dirname}`);
  }
}
