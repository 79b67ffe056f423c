// The architecture, as a test: who may import whom, in both languages; calls that have one home; no dead files; documents
// whose links lead somewhere. The rules are those of ARCHITECTURE.md; changing one here is changing the design.
import assert from 'node:assert/strict';
import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs';
import { basename, dirname, join, relative, resolve } from 'node:path';
import { describe, it } from 'node:test';

const project = resolve(import.meta.dirname, '..');
const src = import.meta.dirname;
const native = join(project, 'native');

function filesBelow(directory: string, ends: RegExp, skip: RegExp = /^$/): readonly string[] {
  return readdirSync(directory, { withFileTypes: true }).flatMap((entry) => {
    const path = join(directory, entry.name);
    if (skip.test(entry.name)) return [];
    if (entry.isDirectory()) return filesBelow(path, ends, skip);
    return ends.test(entry.name) ? [path] : [];
  });
}

const isTest = (file: string): boolean => /\.test\.ts$|(^|\/)test-[^/]*\.ts$/.test(file);
/** `rpc/server.ts` → `rpc`; `main.ts` → `main`. */
const folderOf = (file: string): string =>
  file.includes('/') ? file.slice(0, file.indexOf('/')) : basename(file, '.ts');

interface Import {
  readonly specifier: string;
  readonly typeOnly: boolean;
}

interface Source {
  /** Below src/. */
  readonly file: string;
  readonly text: string;
  /** Without comments. Text in quotes stays. */
  readonly code: string;
  readonly imports: readonly Import[];
}

function read(path: string): Source {
  const text = readFileSync(path, 'utf8');
  const code = text.replace(/\/\*[\s\S]*?\*\//g, '').replace(/(^|[\s;{}(,])\/\/.*$/gm, '$1');
  const statements = [...code.matchAll(/^(?:import|export)\b(?:[^'"`;]*?\bfrom\s*)?\s*['"]([^'"]+)['"]/gm)];
  const calls = [...code.matchAll(/\bimport\(\s*['"]([^'"]+)['"]\s*\)/g)];
  return {
    file: relative(src, path),
    text,
    code,
    imports: [
      ...statements.map(([statement, specifier = '']) => ({
        specifier,
        typeOnly: /^(?:import|export) type\b/.test(statement),
      })),
      ...calls.map(([, specifier = '']) => ({ specifier, typeOnly: false })),
    ],
  };
}

const sources = filesBelow(src, /\.ts$/, /^gen$/).map(read);
const product = sources.filter(({ file }) => !isTest(file));

/** Path below src/, or null for a package. */
function targetOf(from: string, specifier: string): string | null {
  return specifier.startsWith('.') ? relative(src, resolve(src, dirname(from), specifier)) : null;
}

const allowed: Readonly<Record<string, readonly string[]>> = {
  main: ['rpc', 'worker', 'states', 'store', 'engine', 'blockd', 'base', 'gen'],
  rpc: ['worker', 'base', 'gen'],
  blockd: ['engine', 'base', 'gen'],
  cli: ['rpc', 'engine', 'base', 'gen'],
  worker: ['states', 'store', 'engine', 'base'],
  states: ['base'],
  store: ['base'],
  engine: ['base', 'gen'],
  base: [],
};

/** A word of the service that goes down to the hands: Mount. As a type only. */
const vocabulary = 'worker/worker.ts';

const packages: Readonly<Record<string, readonly string[]>> = {
  main: ['commander'],
  rpc: ['@bufbuild/protobuf', '@grpc/grpc-js', 're2js'],
  blockd: ['@bufbuild/protobuf', '@connectrpc/connect', '@connectrpc/connect-node', 'commander', 'pino'],
  cli: ['commander', '@bufbuild/protobuf', '@connectrpc/connect', '@connectrpc/connect-node'],
  worker: ['pino'],
  states: ['xstate'],
  store: [],
  engine: ['@bufbuild/protobuf', '@connectrpc/connect', '@connectrpc/connect-node', 'zod'],
  base: ['pino', 'prom-client', 'strip-json-comments', 'zod'],
};

describe('TypeScript', () => {
  it('has a rule for every folder', () => {
    const folders = new Set(product.map(({ file }) => folderOf(file)));
    assert.deepEqual([...folders].sort(), Object.keys(allowed).sort());
  });

  it('imports in one direction', () => {
    const wrong = product.flatMap(({ file, imports }) =>
      imports.flatMap(({ specifier, typeOnly }) => {
        const target = targetOf(file, specifier);
        if (target === null) return [];
        const [from, to] = [folderOf(file), folderOf(target)];
        if (from === to || allowed[from]?.includes(to) === true) return [];
        return from === 'engine' && typeOnly && target === vocabulary ? [] : [`${file} imports ${target}`];
      }),
    );
    assert.deepEqual(wrong, []);
  });

  it('imports a package only in the folders that own its subject', () => {
    const wrong = product.flatMap(({ file, imports }) =>
      imports.flatMap(({ specifier, typeOnly }) => {
        if (specifier.startsWith('.') || specifier.startsWith('node:')) return [];
        const name = specifier
          .split('/')
          .slice(0, specifier.startsWith('@') ? 2 : 1)
          .join('/');
        if (name === 'pino' && typeOnly) return []; // a logger is handed to whoever speaks
        return packages[folderOf(file)]?.includes(name) === true ? [] : [`${file} imports ${name}`];
      }),
    );
    assert.deepEqual(wrong, []);
  });

  it('never reaches a test, or an implementation that is made for tests, from the product', () => {
    const wrong = product.flatMap(({ file, imports }) =>
      imports.flatMap(({ specifier }) => {
        const target = targetOf(file, specifier);
        return target !== null && (isTest(target) || /(^|\/)memory-[^/]*$/.test(target))
          ? [`${file} imports ${target}`]
          : [];
      }),
    );
    assert.deepEqual(wrong, []);
  });

  const homes: readonly { readonly what: string; readonly pattern: RegExp; readonly files: RegExp }[] = [
    { what: 'the console', pattern: /\bconsole\s*\./, files: /^$/ },
    // Entry points read it once; the addon of a sanitizer build is named by it.
    {
      what: 'the environment',
      pattern: /\bprocess\.env\b/,
      files: /^(main|blockd\/main|cli\/main|engine\/native)\.ts$/,
    },
    { what: 'child processes', pattern: /['"](node:)?child_process['"]/, files: /^engine\// },
    { what: 'the database', pattern: /['"]node:sqlite['"]/, files: /^store\// },
    // Bounded retries against the kernel and against blockd; everything else waits for an event.
    {
      what: 'sleeping',
      pattern: /['"](node:)?timers\/promises['"]|\bAtomics\.wait\b/,
      files: /^(engine\/(mounts|host-process)|worker\/create-worker)\.ts$/,
    },
    // Deadlines, never order.
    {
      what: 'timers',
      pattern: /(?<![.\w])set(Timeout|Interval)\s*\(/,
      files: /^(main|rpc\/server|base\/systemd|blockd\/(main|control-service)|engine\/(io-errors|programs))\.ts$/,
    },
    { what: 'the process’s end', pattern: /\bprocess\.exit\s*\(/, files: /^(main|blockd\/main|cli\/main)\.ts$/ },
    // Times that clients see come from the Clock; the one here is compared with the age of a file.
    { what: 'millisecond clocks', pattern: /\bDate\.now\s*\(|\bnew Date\b/, files: /^engine\/devices\.ts$/ },
    { what: 'code from text', pattern: /\beval\s*\(|\bnew Function\b/, files: /^$/ },
  ];
  for (const { what, pattern, files } of homes) {
    it(`keeps ${what} at home`, () => {
      const strays = product
        .filter(({ file, code }) => pattern.test(code) && !files.test(file))
        .map(({ file }) => file);
      assert.deepEqual(strays, []);
    });
  }

  it('has no file that nobody reaches', () => {
    const entries = /^(main|blockd\/main|cli\/main)\.ts$|\.test\.ts$/;
    const byFile = new Map(sources.map((source) => [source.file, source]));
    const reached = new Set<string>();
    const visit = (file: string): void => {
      if (reached.has(file)) return;
      reached.add(file);
      for (const { specifier } of byFile.get(file)?.imports ?? []) {
        const target = targetOf(file, specifier);
        if (target !== null) visit(target);
      }
    };
    for (const { file } of sources) if (entries.test(file)) visit(file);
    assert.deepEqual(
      sources.map(({ file }) => file).filter((file) => !reached.has(file)),
      [],
    );
  });

  it('leaves nothing for later', () => {
    const unfinished = sources
      .filter(({ file }) => file !== 'tidy.test.ts')
      .filter(({ text }) => /\b(TODO|FIXME|XXX)\b|not implemented yet|\.(skip|only)\(/.test(text));
    assert.deepEqual(
      unfinished.map(({ file }) => file),
      [],
    );
  });
});

/** Each may include those before it. */
const nativeOrder = ['base', 'io', 'lsmt', 'zfile', 'source', 'image', 'fs', 'device', 'tools', 'addon'];
const nativeBeside = ['bench', 'fuzz'];
const nativeFolderOf = (path: string): string => relative(native, path).split('/')[0] ?? '';

describe('C++', () => {
  const files = filesBelow(native, /\.(h|cc)$/, /^testdata$/).map((path) => ({
    file: relative(project, path),
    folder: nativeFolderOf(path),
    text: readFileSync(path, 'utf8'),
  }));

  it('includes in one direction', () => {
    const wrong = files.flatMap(({ file, folder, text }) =>
      [...text.matchAll(/^\s*#\s*include\s+"([^"]+)"/gm)].flatMap(([, included = '']) => {
        const to = included.split('/')[0] ?? '';
        if (to === folder) return [];
        const to_ = nativeOrder.indexOf(to);
        if (to_ === -1) return [`${file} includes ${included}: no such folder`];
        if (nativeBeside.includes(folder)) return [];
        return to_ < nativeOrder.indexOf(folder) ? [] : [`${file} includes ${included}`];
      }),
    );
    assert.deepEqual(wrong, []);
  });

  it('knows Node in addon/ only', () => {
    const strays = files.filter(
      ({ folder, text }) => folder !== 'addon' && /#\s*include\s*[<"](napi|node|v8|uv)\b/.test(text),
    );
    assert.deepEqual(
      strays.map(({ file }) => file),
      [],
    );
  });

  it('has no file outside its folders, and none that is neither compiled nor included', () => {
    const known = [...nativeOrder, ...nativeBeside];
    assert.deepEqual(
      files.filter(({ folder }) => !known.includes(folder)).map(({ file }) => file),
      [],
    );
    const lists = filesBelow(native, /^CMakeLists\.txt$/, /^testdata$/)
      .map((path) => readFileSync(path, 'utf8'))
      .join('\n');
    const dead = files.filter(({ file }) => {
      const name = basename(file);
      if (name.endsWith('.h')) return !files.some(({ text }) => text.includes(`"${relative('native', file)}"`));
      // A list of executables names them without their common prefix.
      const stem = name.replace(/\.cc$/, '').replace(/^overlaybd-/, '(overlaybd-)?');
      return !new RegExp(`(^|[\\s("/])${stem}(\\.cc)?($|[\\s)"])`, 'm').test(lists);
    });
    assert.deepEqual(
      dead.map(({ file }) => file),
      [],
    );
  });
});

describe('documents', () => {
  const documents = filesBelow(project, /\.md$/, /^(node_modules|build|testdata|\..*)$/);
  const anchorsOf = (text: string): ReadonlySet<string> =>
    new Set(
      [...text.replace(/```[\s\S]*?```/g, '').matchAll(/^#{1,6} +(.+)$/gm)].map(([, title = '']) =>
        title
          .toLowerCase()
          .replace(/[^\p{L}\p{N}\s_-]/gu, '')
          .trim()
          .replace(/\s/g, '-'),
      ),
    );

  it('link to what is there', () => {
    const broken = documents.flatMap((path) => {
      const text = readFileSync(path, 'utf8')
        .replace(/```[\s\S]*?```/g, '')
        .replace(/`[^`\n]*`/g, '');
      return [...text.matchAll(/\]\(([^)\s]+)\)/g)].flatMap(([, link = '']) => {
        if (/^[a-z]+:/.test(link)) return [];
        const [file = '', anchor] = link.split('#');
        const target = file === '' ? path : resolve(dirname(path), decodeURI(file));
        const where = `${relative(project, path)}: ${link}`;
        if (!existsSync(target)) return [where];
        if (anchor === undefined || statSync(target).isDirectory() || !target.endsWith('.md')) return [];
        return anchorsOf(readFileSync(target, 'utf8')).has(anchor) ? [] : [where];
      });
    });
    assert.deepEqual(broken, []);
  });
});
