/** What a run measures, from BENCH_* variables; all problems at once. */

export const kParts = ['devices', 'attach', 'rpc', 'memory'] as const;
export type Part = (typeof kParts)[number];
export const kMedia = ['disk', 'tmpfs'] as const;
export type Medium = (typeof kMedia)[number];

export interface Settings {
  readonly parts: readonly Part[];
  readonly media: readonly Medium[];
  /** Length of one fio run. */
  readonly seconds: number;
  /** Every cell is measured so often; subjects alternate within a round. */
  readonly rounds: number;
  /** Layers below the writable one. */
  readonly depths: readonly number[];
  /** Size of the disk that is read and written. */
  readonly sizeMiB: number;
  /** Snapshots that exist while calls are measured. */
  readonly snapshots: readonly number[];
  /** Devices that exist while memory is measured. */
  readonly devices: readonly number[];
  /** Whether our engine opens layer files past the page cache, as its peers here do. */
  readonly directIo: boolean;
  /** Request threads of each of our devices; 0 = what the daemon takes by itself. */
  readonly threads: number;
  /** Regular expression of the subjects to measure; raw is always measured. */
  readonly subjects: RegExp;
  readonly jobs: RegExp;
  readonly out: string | null;
}

export function settingsOf(env: Readonly<Record<string, string | undefined>>): Settings {
  const problems: string[] = [];
  const numbers = (name: string, fallback: string): readonly number[] => {
    const values = (env[name] ?? fallback).split(',').map(Number);
    if (values.some((value) => !(value > 0 || value === 0))) problems.push(`${name}: numbers, comma separated`);
    return values;
  };
  const number = (name: string, fallback: string): number => {
    const [value] = numbers(name, fallback);
    if (value === undefined || value <= 0) problems.push(`${name}: a number above 0`);
    return value ?? 1;
  };
  const words = <Word extends string>(name: string, known: readonly Word[]): readonly Word[] => {
    const given = (env[name] ?? known.join(',')).split(',');
    const unknown = given.filter((word) => !known.includes(word as Word));
    if (unknown.length > 0) problems.push(`${name}: ${unknown.join(', ')} is none of ${known.join(', ')}`);
    return known.filter((word) => given.includes(word));
  };
  const settings: Settings = {
    parts: words('BENCH_ONLY', kParts),
    media: words('BENCH_MEDIA', kMedia),
    seconds: number('BENCH_SECONDS', '1'),
    rounds: number('BENCH_ROUNDS', '3'),
    depths: numbers('BENCH_DEPTHS', '1,30'),
    sizeMiB: number('BENCH_SIZE_MIB', '512'),
    snapshots: numbers('BENCH_SNAPSHOTS', '10,1000,10000'),
    devices: numbers('BENCH_DEVICES', '0,1,100'),
    directIo: env['BENCH_DIRECT_IO'] !== '0',
    threads: Number(env['BENCH_THREADS'] ?? '0'),
    subjects: new RegExp(env['BENCH_SUBJECTS'] ?? ''),
    jobs: new RegExp(env['BENCH_JOBS'] ?? ''),
    out: env['BENCH_OUT'] ?? null,
  };
  if (problems.length > 0) throw new Error(problems.join('\n'));
  return settings;
}
