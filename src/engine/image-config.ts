/** config.v1.json: the file that tells an engine (ours, the original, the attacher tool) what an image is made of.
 * Format: formats.md §14. Keys we do not know are somebody's (a `download` block added by hand, turboOCI's target
 * files) and survive every rewrite. */
import { z } from 'zod';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import type { ImageConfig, LowerEntry } from './engine.ts';

const lowerSchema = z.looseObject({
  file: z.string().optional(),
  dir: z.string().optional(),
  digest: z.string().optional(),
  size: z.number().int().nonnegative().optional(),
});

const configSchema = z.looseObject({
  repoBlobUrl: z.string().default(''),
  lowers: z.array(lowerSchema).default([]),
  upper: z
    .looseObject({
      data: z.string().default(''),
      index: z.string().default(''),
      vsize: z.number().int().nonnegative().optional(),
    })
    .optional(),
  resultFile: z.string().default(''),
});

/** A hostile or damaged file must not cost more memory than this; 256 layers with long paths are below 1 MiB. */
export const kConfigMaxBytes = 16 * 1024 * 1024;

/** DataLoss when the text is not a config. `path` is for the message. */
export function parseImageConfig(path: string, text: string): ImageConfig {
  const raw = parseJson(text);
  if (raw === undefined) throw new SnapshotterError(ErrorKind.DataLoss, `image config ${path}: not JSON`);
  const parsed = configSchema.safeParse(raw);
  if (!parsed.success) {
    const problems = parsed.error.issues.map((issue) => `${issue.path.join('.') || 'file'}: ${issue.message}`);
    throw new SnapshotterError(ErrorKind.DataLoss, `image config ${path}: ${problems.join('; ')}`);
  }
  const { repoBlobUrl, lowers, upper, resultFile } = parsed.data;
  const writable = upper !== undefined && upper.data !== '' && upper.index !== '';
  return {
    repoBlobUrl,
    lowers: lowers.map((lower) => withoutUndefined(lower)),
    upper: writable
      ? {
          data: upper.data,
          index: upper.index,
          ...(upper.vsize === undefined ? {} : { vsize: upper.vsize }),
        }
      : null,
    resultFile,
  };
}

/** The text of `config`, with the unknown keys of `before` (the file being replaced; null = none). */
export function formatImageConfig(config: ImageConfig, before: string | null): string {
  const old = asRecord(before === null ? undefined : parseJson(before));
  const oldLowers = Array.isArray(old['lowers']) ? old['lowers'].map(asRecord) : [];
  const lowers = config.lowers.map((lower) => {
    const same = oldLowers.find((entry) => identity(entry) === identity(lower));
    return { ...unknownKeys(same ?? {}, lowerSchema.shape), ...withoutUndefined(lower) };
  });
  const upper = config.upper === null ? {} : { ...asRecord(old['upper']), ...withoutUndefined(config.upper) };
  const { repoBlobUrl, resultFile } = config;
  return `${JSON.stringify({ ...old, repoBlobUrl, lowers, upper, resultFile })}\n`;
}

/** What makes a lower of the old file and one of the new the same layer. */
function identity(lower: LowerEntry | Record<string, unknown>): string {
  const { file, dir, digest } = lower as Record<string, unknown>;
  return JSON.stringify([file ?? '', dir ?? '', digest ?? '']);
}

function unknownKeys(record: Record<string, unknown>, known: object): Record<string, unknown> {
  return Object.fromEntries(Object.entries(record).filter(([key]) => !Object.hasOwn(known, key)));
}

/** exactOptionalPropertyTypes: an absent key is not a key that is undefined. */
function withoutUndefined<T extends object>(value: T): { [K in keyof T]: Exclude<T[K], undefined> } {
  return Object.fromEntries(Object.entries(value).filter(([, entry]) => entry !== undefined)) as {
    [K in keyof T]: Exclude<T[K], undefined>;
  };
}

function asRecord(value: unknown): Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value) ? { ...value } : {};
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text) as unknown;
  } catch {
    return undefined;
  }
}
