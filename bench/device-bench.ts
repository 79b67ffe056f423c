/** fio on our device, on a raw loop and on qemu-storage-daemon's, alternating in one run. */
import { mkdirSync } from 'node:fs';
import path from 'node:path';
import { mounted } from '../e2e/harness/mounts.ts';
import type { Workdir } from '../e2e/harness/workdir.ts';
import type { RealEngine } from '../src/engine/real-engine.ts';
import { type Job, kJobs, runFio, type Sample } from './fio.ts';
import type { Medium, Settings } from './settings.ts';
import { ours, qsd, rawLoop, type Subject } from './subjects.ts';
import { median, print, short, table } from './table.ts';

/** Samples by subject and job. */
export type Samples = Map<string, Map<string, Sample[]>>;

/** Where layer files lie: below the checkout (a disk), or on a tmpfs of our own. */
async function placeOf(work: Workdir, medium: Medium): Promise<string> {
  const dir = path.join(work.path, `layers-${medium}`);
  mkdirSync(dir, { recursive: true });
  if (medium === 'tmpfs') {
    await mounted(work, [{ type: 'tmpfs', source: 'overlaybd-bench', options: ['size=80%', 'huge=never'] }], dir);
  }
  return dir;
}

export async function benchDevices(work: Workdir, engine: RealEngine, settings: Settings, medium: Medium) {
  const dir = await placeOf(work, medium);
  const { sizeMiB } = settings;
  const makers: readonly { name: string; make: () => Promise<Subject> }[] = [
    { name: 'raw loop', make: () => rawLoop(work, dir, sizeMiB) },
    ...settings.depths.flatMap((depth) => [
      ...(['append', 'sparse'] as const).map((type) => ({
        name: `overlaybd ${type} ${depth}`,
        make: () => ours(engine, work, dir, { type, depth, sizeMiB }),
      })),
      { name: `qsd qcow2 ${depth}`, make: () => qsd(work, dir, depth, sizeMiB) },
    ]),
  ];
  const subjects: Subject[] = [];
  for (const { name, make } of makers) {
    if (name !== 'raw loop' && !settings.subjects.test(name)) continue;
    process.stderr.write(`  ${medium}: prepares ${name}\n`);
    subjects.push(await make());
  }
  const jobs = kJobs.filter((job) => settings.jobs.test(job.name));
  const samples: Samples = new Map(subjects.map(({ name }) => [name, new Map(jobs.map((job) => [job.name, []]))]));
  for (let round = 0; round < settings.rounds; round++) {
    process.stderr.write(`  ${medium}: round ${round + 1} of ${settings.rounds}\n`);
    const devices = new Map<Subject, string>();
    for (const subject of subjects) devices.set(subject, await subject.reset());
    for (const job of jobs) {
      // Another order each round: who comes after whom must not matter.
      for (let i = 0; i < subjects.length; i++) {
        const subject = subjects[(i + round) % subjects.length];
        const device = subject === undefined ? undefined : devices.get(subject);
        if (subject === undefined || device === undefined) continue;
        const sample = await runFio(job, device, subject.serverPid(), settings.seconds, sizeMiB);
        samples.get(subject.name)?.get(job.name)?.push(sample);
      }
    }
  }
  for (const subject of subjects) await subject.close();
  report(medium, samples, jobs);
  return Object.fromEntries([...samples].map(([name, byJob]) => [name, Object.fromEntries(byJob)]));
}

function report(medium: Medium, samples: Samples, jobs: readonly Job[]): void {
  const of = (subject: string, job: Job): readonly Sample[] => samples.get(subject)?.get(job.name) ?? [];
  const at = (subject: string, job: Job): number => median(of(subject, job).map(({ rate }) => rate));
  const peer = (subject: string): string => `qsd qcow2 ${subject.split(' ').at(-1)}`;
  const ratio = (value: number, base: number): string => (Number.isFinite(base) ? (value / base).toFixed(2) : '–');
  print(`\n### Layer files on ${medium}: median (ratio to raw loop / to qsd of the same depth)\n`);
  const rows = [...samples.keys()].map((subject) => [
    subject,
    ...jobs.map((job) => {
      const value = at(subject, job);
      const own = subject.startsWith('overlaybd');
      const ratios = own ? ` (${ratio(value, at('raw loop', job))} / ${ratio(value, at(peer(subject), job))})` : '';
      const others = subject.startsWith('qsd') ? ` (${ratio(value, at('raw loop', job))})` : '';
      return `${short(value)}${ratios}${others}`;
    }),
  ]);
  print(table(['subject, layers', ...jobs.map((job) => `${job.name} ${job.unit}`)], rows));
  const served = [...samples.keys()].filter((subject) => subject !== 'raw loop');
  const cpuOf = (subject: string, job: Job): number =>
    median(of(subject, job).flatMap(({ serverUs }) => (serverUs === null ? [] : [serverUs])));
  print(`\n### The same: processor time of the server per operation, µs\n`);
  print(
    table(
      ['subject, layers', ...jobs.map(({ name }) => name)],
      served.map((subject) => [subject, ...jobs.map((job) => short(cpuOf(subject, job)))]),
    ),
  );
}
