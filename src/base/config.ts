/** Loads config.json: upstream's file as it is, with comments and trailing commas. All problems are reported at once, each
 * with the path of its key. The result is frozen; nobody reads the file or the environment later. */
import { readFile } from 'node:fs/promises';
import { relative } from 'node:path';
import stripJsonComments from 'strip-json-comments';
import type { z } from 'zod';
import { configSchema, upstreamSchema, workerSchema } from './config-schema.ts';

export const kDefaultConfigPath = '/etc/overlaybd-snapshotter/config.json';
const kFileMaxBytes = 1024 * 1024;

type DeepReadonly<T> = T extends readonly (infer Item)[]
  ? readonly DeepReadonly<Item>[]
  : T extends object
    ? { readonly [K in keyof T]: DeepReadonly<T[K]> }
    : T;

export type LogLevel = 'trace' | 'debug' | 'info' | 'warn' | 'error' | 'fatal';
export type RwMode = 'overlayfs' | 'dir' | 'dev';

type Parsed = DeepReadonly<z.infer<typeof configSchema>>;

/** The file's keys with their defaults; texts that upstream reads tolerantly are settled. */
export type Config = Omit<Parsed, 'rwMode' | 'writableLayerType'> & {
  readonly rwMode: RwMode;
  readonly writableLayerType: 'append' | 'sparse';
  /** From `overlaybdWorker.logLevel`, else from `verbose`. */
  readonly logLevel: LogLevel;
};

export interface StoreConfig {
  readonly name: string;
  readonly address: string;
  readonly root: string;
}

export interface LoadedConfig {
  readonly config: Config;
  /** What was tolerated, to be logged once. */
  readonly warnings: readonly string[];
}

export class ConfigError extends Error {
  /** One line each, beginning with a key path where there is one. */
  readonly problems: readonly string[];

  constructor(source: string, problems: readonly string[]) {
    super(
      `${source}: ${problems.length === 1 ? 'a problem' : `${problems.length} problems`}\n  ${problems.join('\n  ')}`,
    );
    this.name = 'ConfigError';
    this.problems = problems;
  }
}

/** Errors: ConfigError. */
export async function loadConfig(path: string): Promise<LoadedConfig> {
  let bytes: Buffer;
  try {
    bytes = await readFile(path);
  } catch (error) {
    throw new ConfigError(path, [`cannot be read: ${error instanceof Error ? error.message : String(error)}`]);
  }
  if (bytes.length > kFileMaxBytes) throw new ConfigError(path, [`is larger than ${kFileMaxBytes} bytes`]);
  return parseConfig(bytes.toString('utf8'), path);
}

/** Errors: ConfigError, naming `source`. */
export function parseConfig(text: string, source: string): LoadedConfig {
  let json: unknown;
  try {
    // Comments become spaces, so that positions in messages are those of the file.
    json = JSON.parse(stripJsonComments(text.replace(/^\ufeff/, ' '), { trailingCommas: true }));
  } catch (error) {
    throw new ConfigError(source, [`is not JSON: ${error instanceof Error ? error.message : String(error)}`]);
  }
  if (!isObject(json)) throw new ConfigError(source, ['must hold a JSON object']);
  const warnings: string[] = [];
  const input = withCanonicalKeys(json, upstreamKeys, '', warnings);
  const parsed = configSchema.safeParse(input);
  const problems = parsed.success ? storeProblems(storesOf(parsed.data)) : parsed.error.issues.flatMap(wordsOf);
  // An ignored key may be the reason why another one is missing.
  if (!parsed.success || problems.length > 0) throw new ConfigError(source, [...problems, ...warnings]);
  const { rwMode, writableLayerType, verbose, ...rest } = parsed.data;
  if (rest.rootfsQuota !== '') warnings.push('rootfsQuota: quotas are not enforced by this version');
  const config: Config = {
    ...rest,
    verbose,
    rwMode: oneOf('rwMode', rwMode, ['overlayfs', 'dir', 'dev'], 'overlayfs', warnings),
    writableLayerType: oneOf('writableLayerType', writableLayerType, ['append', 'sparse'], 'append', warnings),
    logLevel: rest.overlaybdWorker.logLevel ?? logLevelOf(verbose, warnings),
  };
  return { config: freeze(config), warnings };
}

/** The store of containerd, named by upstream's keys, and those of further owners. */
export function storesOf(config: Pick<Parsed, 'root' | 'address' | 'overlaybdWorker'>): readonly StoreConfig[] {
  return [{ name: 'default', address: config.address, root: config.root }, ...config.overlaybdWorker.stores];
}

/** logrus' names to pino's. */
const levelOfVerbose: Readonly<Record<string, LogLevel>> = {
  trace: 'trace',
  debug: 'debug',
  info: 'info',
  warn: 'warn',
  warning: 'warn',
  error: 'error',
  fatal: 'fatal',
  panic: 'fatal',
};

function logLevelOf(verbose: string, warnings: string[]): LogLevel {
  const name = verbose.toLowerCase();
  const level = Object.hasOwn(levelOfVerbose, name) ? levelOfVerbose[name] : undefined;
  if (level !== undefined) return level;
  warnings.push(`verbose: ${JSON.stringify(verbose)} is no log level; info is used`);
  return 'info';
}

function oneOf<T extends string>(key: string, value: string, known: readonly T[], otherwise: T, warnings: string[]): T {
  const found = known.find((name) => name === value);
  if (found !== undefined) return found;
  warnings.push(`${key}: ${JSON.stringify(value)} is none of ${known.join(', ')}; ${otherwise} is used`);
  return otherwise;
}

/** Upstream reads key names in any letter case, and takes null for "not given". */
interface KeyTree {
  readonly [key: string]: KeyTree | null;
}

const keysOf = (shape: object, nested: KeyTree): KeyTree => ({
  ...Object.fromEntries(Object.keys(shape).map((key) => [key, null])),
  ...nested,
});

const upstreamKeys = keysOf(upstreamSchema.shape, {
  exporterConfig: { enable: null, uriPrefix: null, port: null },
  mirrorRegistry: { host: null, insecure: null },
  overlaybdWorker: null,
});

function withCanonicalKeys(value: object, tree: KeyTree, at: string, warnings: string[]): Record<string, unknown> {
  const result: Record<string, unknown> = {};
  for (const [given, inner] of Object.entries(value)) {
    const key = Object.keys(tree).find((name) => name.toLowerCase() === given.toLowerCase());
    if (key === undefined) {
      const near = Object.keys(tree).find((name) => editDistance(name.toLowerCase(), given.toLowerCase()) <= 2);
      warnings.push(`${at}${given}: unknown key, ignored${near === undefined ? '' : `; did you mean ${at}${near}?`}`);
    } else if (inner !== null) {
      result[key] = descend(inner, tree[key] ?? null, `${at}${key}`, warnings);
    }
  }
  return result;
}

function descend(value: unknown, tree: KeyTree | null, at: string, warnings: string[]): unknown {
  if (tree === null) return value;
  if (Array.isArray(value)) return value.map((item, i) => descend(item, tree, `${at}[${i}]`, warnings));
  return isObject(value) ? withCanonicalKeys(value, tree, `${at}.`, warnings) : value;
}

function isObject(value: unknown): value is object {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function wordsOf(issue: z.core.$ZodIssue): readonly string[] {
  const at = issue.path.reduce<string>(
    (text, part) => (typeof part === 'number' ? `${text}[${part}]` : `${text}${text === '' ? '' : '.'}${String(part)}`),
    '',
  );
  if (issue.code === 'unrecognized_keys') {
    return issue.keys.map((key) => {
      const suggestion = nearest(key, at);
      return `${at}.${key}: unknown key${suggestion === null ? '' : `; did you mean ${suggestion}?`}`;
    });
  }
  if (issue.code === 'invalid_type' && issue.input === undefined && /received undefined/.test(issue.message)) {
    return [`${at}: must be set`];
  }
  return [`${at}: ${issue.message.replace(/^Invalid input: /, '')}`];
}

/** Our own keys by dotted path, below `overlaybdWorker`. */
const workerPaths: readonly string[] = pathsOf(workerSchema.shape, '');

function pathsOf(shape: Readonly<Record<string, z.core.$ZodType>>, prefix: string): readonly string[] {
  return Object.entries(shape).flatMap(([key, type]) => {
    const inner = shapeOf(type);
    return inner === null ? [`${prefix}${key}`] : [`${prefix}${key}`, ...pathsOf(inner, `${prefix}${key}.`)];
  });
}

function shapeOf(type: z.core.$ZodType): Readonly<Record<string, z.core.$ZodType>> | null {
  const def = type._zod.def as {
    readonly innerType?: z.core.$ZodType;
    readonly shape?: Record<string, z.core.$ZodType>;
  };
  if (def.shape !== undefined) return def.shape;
  return def.innerType === undefined ? null : shapeOf(def.innerType);
}

/** The key that was probably meant: the nearest spelling at the same place, else anywhere, else upstream's own. */
function nearest(key: string, at: string): string | null {
  const wanted = key.toLowerCase();
  const here = at.replace(/^overlaybdWorker\.?/, '').replace(/\[\d+\]/g, '');
  const candidates = [
    ...workerPaths.map((path) => ({ shown: `overlaybdWorker.${path}`, path })),
    ...Object.keys(upstreamSchema.shape).map((path) => ({ shown: `${path} (outside overlaybdWorker)`, path })),
  ].map(({ shown, path }) => {
    const parent = path.slice(0, Math.max(0, path.lastIndexOf('.')));
    const last = path.slice(path.lastIndexOf('.') + 1).toLowerCase();
    const joined = path.replaceAll('.', '').toLowerCase();
    const distance = Math.min(editDistance(wanted, last), editDistance(wanted, joined));
    return { shown, distance: distance + (parent === here ? 0 : 0.5) };
  });
  const best = candidates.reduce((a, b) => (b.distance < a.distance ? b : a));
  return best.distance <= Math.max(2.5, key.length / 3) ? best.shown : null;
}

function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, i) => i);
  for (let i = 1; i <= a.length; i += 1) {
    const next = [i];
    for (let j = 1; j <= b.length; j += 1) {
      const replace = (row[j - 1] ?? 0) + (a[i - 1] === b[j - 1] ? 0 : 1);
      next.push(Math.min(replace, (row[j] ?? 0) + 1, (next[j - 1] ?? 0) + 1));
    }
    row = next;
  }
  return row[b.length] ?? 0;
}

function storeProblems(stores: readonly StoreConfig[]): readonly string[] {
  const problems: string[] = [];
  stores.forEach((store, i) => {
    const at = i === 0 ? '' : `overlaybdWorker.stores[${i - 1}].`;
    for (const other of stores.slice(0, i)) {
      if (other.name === store.name) problems.push(`${at}name: ${store.name} is taken`);
      if (other.address === store.address) problems.push(`${at}address: store ${other.name} listens there`);
      if (isWithin(other.root, store.root) || isWithin(store.root, other.root)) {
        problems.push(`${at}root: must not contain, be or lie in the root of store ${other.name} (${other.root})`);
      }
    }
  });
  return problems;
}

function isWithin(parent: string, path: string): boolean {
  const way = relative(parent, path);
  return way === '' || (way !== '..' && !way.startsWith('../'));
}

function freeze<T>(value: T): T {
  if (typeof value === 'object' && value !== null && !Object.isFrozen(value)) {
    Object.freeze(value);
    for (const inner of Object.values(value)) freeze(inner);
  }
  return value;
}
