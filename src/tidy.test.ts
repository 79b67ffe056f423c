/** Invariants: calls and imports go one way, in TypeScript and in C++; the process environment, consoles and child
 * processes are used in their places only; no source file is dead; links in documents resolve. */
import assert from 'node:assert/strict';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, join, relative, resolve, sep } from 'node:path';
import { describe, it } from 'node:test';
import { fileURLToPath } from 'node:url';

const top = fileURLToPath(new URL('..', import.meta.url));

/** Which folders of src a folder may import, besides itself. `main` is src/main.ts, the composition root. */
const allowedImports: Readonly<Record<string, readonly string[]>> = {
  main: ['rpc', 'worker', 'states', 'store', 'engine', 'base', 'gen'],
  rpc: ['worker', 'base', 'gen'],
  blockd: ['engine', 'base', 'gen'],
  cli: ['engine', 'base', 'gen'],
  worker: ['states', 'store', 'engine', 'base'],
  states: ['base'],
  store: ['base'],
  engine: ['base', 'gen'],
  base: [],
  gen: [],
};

/** Type-only imports that name the shared vocabulary may also go up: they leave nothing at run time. */
const vocabulary = new Set(['worker/worker.ts', 'engine/engine.ts']);

/** native/: each folder may include those before it. */
const nativeOrder = ['base', 'io', 'lsmt', 'zfile', 'image', 'device', 'tools', 'addon'] as const;

function filesBelow(folder: string, ending: RegExp): readonly string[] {
  const found: string[] = [];
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const path = join(folder, entry.name);
    if (entry.isDirectory()) {
      if (entry.name !== 'node_modules' && entry.name !== 'testdata' && !entry.name.startsWith('.')) {
        found.push(...filesBelow(path, ending));
      }
    } else if (ending.test(entry.name)) {
      found.push(path);
    }
  }
  return found.sort();
}

const src = join(top, 'src');
const sources = filesBelow(src, /\.ts$/).filter((path) => !path.startsWith(join(src, 'gen') + sep));
const isTest = (path: string): boolean => path.endsWith('.test.ts');

interface Import {
  readonly from: string;
  readonly to: string;
  readonly typeOnly: boolean;
}

function importsOf(path: string): readonly Import[] {
  const text = readFileSync(path, 'utf8');
  const found: Import[] = [];
  for (const match of text.matchAll(/^(?:import|export)\s+(type\s+)?(?:[^'";]*?\sfrom\s+)?'(\.[^']+)';/gms)) {
    found.push({ from: path, to: resolve(dirname(path), match[2] ?? ''), typeOnly: match[1] !== undefined });
  }
  for (const match of text.matchAll(/import\('(\.[^']+)'\)/g)) {
    found.push({ from: path, to: resolve(dirname(path), match[1] ?? ''), typeOnly: false });
  }
  return found;
}

function folderOf(path: string): string {
  const parts = relative(src, path).split(sep);
  return parts.length === 1 ? 'main' : (parts[0] ?? '');
}

describe('src', () => {
  it('has no folder that the table of import directions does not know', () => {
    for (const path of sources) assert.ok(folderOf(path) in allowedImports, relative(top, path));
  });

  it('imports in one direction only', () => {
    const wrong: string[] = [];
    for (const path of sources.filter((source) => !isTest(source))) {
      for (const { to, typeOnly } of importsOf(path)) {
        const [here, there] = [folderOf(path), folderOf(to)];
        if (here === there || allowedImports[here]?.includes(there)) continue;
        if (typeOnly && vocabulary.has(relative(src, to))) continue;
        wrong.push(`${relative(top, path)} imports ${relative(top, to)}`);
      }
    }
    assert.deepEqual(wrong, []);
  });

  it('reaches every file from an entry point or its own test', () => {
    const entries = ['main.ts', 'blockd/main.ts', 'cli/main.ts'].map((entry) => join(src, entry));
    const seen = new Set<string>();
    const visit = (path: string): void => {
      if (seen.has(path)) return;
      seen.add(path);
      if (existsSync(path)) for (const { to } of importsOf(path)) visit(to);
    };
    for (const entry of [...entries, ...sources.filter(isTest)]) visit(entry);
    const scripts = sources.filter((path) => /^#!|^\/\*\* Script: /m.test(readFileSync(path, 'utf8').slice(0, 400)));
    for (const script of scripts) visit(script);
    assert.deepEqual(
      sources.filter((path) => !seen.has(path)).map((path) => relative(top, path)),
      [],
    );
  });

  it('uses what belongs to one place only there', () => {
    const places: readonly { readonly what: string; readonly pattern: RegExp; readonly where: RegExp }[] = [
      { what: 'process.env', pattern: /\bprocess\.env\b/, where: /^(main|blockd\/main|cli\/main|engine\/native)\.ts$/ },
      { what: 'console', pattern: /\bconsole\.(log|error|warn|info)\b/, where: /^$/ },
      { what: 'child processes', pattern: /from 'node:child_process'/, where: /^engine\/programs\.ts$/ },
      { what: 'the addon', pattern: /\bloadNative\(/, where: /^(engine\/native|main|blockd\/main|cli\/main)\.ts$/ },
      { what: 'node:sqlite', pattern: /from 'node:sqlite'/, where: /^store\// },
      { what: 'grpc-js', pattern: /from '@grpc\/grpc-js'/, where: /^rpc\// },
      { what: 'process.exit', pattern: /\bprocess\.exit\(/, where: /^(main|blockd\/main|cli\/main)\.ts$/ },
    ];
    const wrong: string[] = [];
    for (const path of sources.filter((source) => !isTest(source))) {
      const text = readFileSync(path, 'utf8');
      const name = relative(src, path);
      for (const { what, pattern, where } of places) {
        if (pattern.test(text) && !where.test(name)) wrong.push(`${name}: ${what}`);
      }
    }
    assert.deepEqual(wrong, []);
  });

  it('keeps no note of unfinished work', () => {
    const marker = new RegExp(['TO' + 'DO', 'FIX' + 'ME', 'XX' + 'X', 'not implemented yet'].join('|'));
    const all = [
      ...sources,
      ...filesBelow(join(top, 'native'), /\.(h|cc)$/),
      ...filesBelow(join(top, 'e2e'), /\.(ts|go)$/),
    ];
    assert.deepEqual(
      all.filter((path) => path !== fileURLToPath(import.meta.url) && marker.test(readFileSync(path, 'utf8'))),
      [],
    );
  });
});

describe('native', () => {
  const native = join(top, 'native');
  const files = nativeOrder.flatMap((folder) => filesBelow(join(native, folder), /\.(h|cc)$/));

  it('includes in one direction only', () => {
    const wrong: string[] = [];
    for (const path of files) {
      const here = nativeOrder.indexOf(relative(native, path).split(sep)[0] as (typeof nativeOrder)[number]);
      for (const match of readFileSync(path, 'utf8').matchAll(/^#include "([a-z]+)\//gm)) {
        const there = nativeOrder.indexOf(match[1] as (typeof nativeOrder)[number]);
        if (there < 0 || there > here) wrong.push(`${relative(top, path)} includes ${match[1]}/`);
      }
    }
    assert.deepEqual(wrong, []);
  });

  it('knows Node in the addon only', () => {
    const wrong = files.filter((path) => {
      const inAddon = path.startsWith(join(native, 'addon') + sep);
      return !inAddon && /#include [<"](napi|node_api|node)\.h[>"]/.test(readFileSync(path, 'utf8'));
    });
    assert.deepEqual(wrong, []);
  });
});

describe('documents', () => {
  it('link to files that exist', () => {
    const documents = [
      ...readdirSync(top)
        .filter((name) => name.endsWith('.md'))
        .map((name) => join(top, name)),
      ...['docs', 'src', 'native', 'proto', 'bench', 'e2e'].flatMap((folder) => filesBelow(join(top, folder), /\.md$/)),
    ];
    const broken: string[] = [];
    for (const path of documents) {
      for (const match of readFileSync(path, 'utf8').matchAll(/\]\(([^)#\s]+)(?:#[^)]*)?\)/g)) {
        const target = match[1] ?? '';
        if (/^[a-z]+:/.test(target)) continue;
        if (!existsSync(resolve(dirname(path), target))) broken.push(`${relative(top, path)} → ${target}`);
      }
    }
    assert.deepEqual(broken, []);
  });
});
