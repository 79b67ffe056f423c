/** Root file systems out of Debian packages: downloads them as an ordinary client of the machine's own sources, follows
 * library dependencies and proves that nothing is missing. */
import { mkdirSync, readdirSync, rmSync } from 'node:fs';
import path from 'node:path';
import { run, runAny } from '../harness/processes.ts';
import { cacheDir } from './oci.ts';

export interface Package {
  readonly name: string;
  readonly version: string;
  /** Path of the .deb file. */
  readonly file: string;
}

/** The packages and the libraries they depend on, recursively; what only maintainer scripts need is left out. */
export async function downloadWithLibraries(names: readonly string[]): Promise<readonly Package[]> {
  const wanted = new Set(names);
  const packages: Package[] = [];
  for (const name of wanted) {
    const deb = await download(name);
    packages.push(deb);
    for (const dependency of await dependencies(deb.file)) if (isLibrary(dependency)) wanted.add(dependency);
  }
  return packages;
}

/** Unpacks without running any script; documentation and translations stay out. */
export async function unpack(deb: Package, root: string): Promise<void> {
  mkdirSync(root, { recursive: true });
  await run('dpkg-deb', ['--extract', deb.file, root]);
  for (const part of ['doc', 'man', 'locale', 'lintian', 'bug']) {
    rmSync(path.join(root, 'usr/share', part), { recursive: true, force: true });
  }
}

/** Every shared library that a program or library of the trees needs and that none of them has. */
export async function missingLibraries(trees: readonly string[]): Promise<readonly string[]> {
  const files = trees.flatMap((tree) =>
    readdirSync(tree, { recursive: true, withFileTypes: true })
      .filter((entry) => entry.isFile() || entry.isSymbolicLink())
      .map((entry) => ({ name: entry.name, file: path.join(entry.parentPath, entry.name), regular: entry.isFile() })),
  );
  const present = new Set(files.map(({ name }) => name));
  const missing = new Set<string>();
  for (const { file } of files.filter(
    ({ file: candidate, regular }) => regular && /\.so[.0-9]*$|\/s?bin\//.test(candidate),
  )) {
    // Not an ELF file: no answer, nothing needed.
    const { stdout } = await runAny('readelf', ['--dynamic', '--wide', file]);
    for (const [, needed] of stdout.matchAll(/\(NEEDED\).*\[(.+)\]/g)) {
      if (needed !== undefined && !present.has(needed)) missing.add(`${needed} (for ${path.basename(file)})`);
    }
  }
  return [...missing];
}

function isLibrary(name: string): boolean {
  return /^lib|^lua|^zlib1g$/.test(name);
}

/** First alternative of each dependency. */
async function dependencies(file: string): Promise<readonly string[]> {
  const field = await run('dpkg-deb', ['--field', file, 'Depends']);
  return field
    .split(',')
    .map((dependency) => /^[a-z0-9.+-]+/.exec(dependency.trim())?.[0] ?? '')
    .filter((name) => name !== '');
}

async function download(name: string): Promise<Package> {
  const dir = path.join(cacheDir, 'debs');
  mkdirSync(dir, { recursive: true });
  const find = (): string | undefined =>
    readdirSync(dir).find((file) => file.startsWith(`${name}_`) && file.endsWith('.deb'));
  let file = find();
  if (file === undefined) {
    const first = await runAny('apt-get', ['download', name], { cwd: dir });
    if (first.code !== 0) {
      // The machine's lists may be older than the archive.
      await run('apt-get', ['update', '-qq'], { timeoutMs: 300_000 });
      await run('apt-get', ['download', name], { cwd: dir });
    }
    file = find();
  }
  if (file === undefined) throw new Error(`apt-get download ${name}: no file`);
  const full = path.join(dir, file);
  const version = (await run('dpkg-deb', ['--field', full, 'Version'])).trim();
  return { name, version, file: full };
}
