/** The fio jobs, and one run of one of them on a block device. */
import { readdirSync, readFileSync } from 'node:fs';
import { z } from 'zod';
import { run } from '../e2e/harness/processes.ts';

export interface Job {
  readonly name: string;
  readonly unit: 'IOPS' | 'MB/s';
  readonly writes: boolean;
  readonly args: readonly string[];
}

/** Bytes that a run of a sequential job moves at most: append layers grow by what is written. */
const kSequentialMiB = 512;

export const kJobs: readonly Job[] = [
  { name: 'randread q1', unit: 'IOPS', writes: false, args: ['--rw=randread', '--bs=4k', '--iodepth=1'] },
  { name: 'randread q32', unit: 'IOPS', writes: false, args: ['--rw=randread', '--bs=4k', '--iodepth=32'] },
  { name: 'seqread 1M', unit: 'MB/s', writes: false, args: ['--rw=read', '--bs=1m', '--iodepth=8'] },
  { name: 'randwrite q1', unit: 'IOPS', writes: true, args: ['--rw=randwrite', '--bs=4k', '--iodepth=1'] },
  { name: 'randwrite q32', unit: 'IOPS', writes: true, args: ['--rw=randwrite', '--bs=4k', '--iodepth=32'] },
  { name: 'fsync 4k', unit: 'IOPS', writes: true, args: ['--rw=randwrite', '--bs=4k', '--iodepth=1', '--fsync=1'] },
  { name: 'seqwrite 1M', unit: 'MB/s', writes: true, args: ['--rw=write', '--bs=1m', '--iodepth=8'] },
];

const side = z.object({ iops: z.number(), bw_bytes: z.number(), total_ios: z.number() });
const report = z.object({ jobs: z.array(z.object({ error: z.number(), read: side, write: side })).length(1) });

export interface Sample {
  /** Operations or MB per second. */
  readonly rate: number;
  /** Processor time of the serving process for one operation, in microseconds; null = no such process. It holds on a busy
   * machine, where the rate does not. */
  readonly serverUs: number | null;
}

export async function runFio(
  job: Job,
  device: string,
  serverPid: number | null,
  seconds: number,
  sizeMiB: number,
): Promise<Sample> {
  const bounded = job.unit === 'MB/s' ? [`--io_size=${kSequentialMiB}m`] : [];
  const before = serverPid === null ? 0 : cpuNanoseconds(serverPid);
  const text = await run(
    'fio',
    [
      `--name=${job.name.replaceAll(' ', '-')}`,
      `--filename=${device}`,
      '--ioengine=io_uring',
      '--direct=1',
      `--size=${sizeMiB}m`,
      `--runtime=${seconds}`,
      ...(job.unit === 'MB/s' ? [] : ['--time_based']),
      ...bounded,
      ...job.args,
      '--randrepeat=0',
      '--norandommap',
      '--output-format=json',
      '--allow_file_create=0',
    ],
    { timeoutMs: (seconds + 120) * 1000 },
  );
  // Warnings come before the report.
  const [result] = report.parse(JSON.parse(text.slice(text.indexOf('{')))).jobs;
  if (result === undefined || result.error !== 0)
    throw new Error(`fio ${job.name} on ${device}: error ${result?.error}`);
  const done = job.writes ? result.write : result.read;
  const spent = serverPid === null ? null : cpuNanoseconds(serverPid) - before;
  return {
    rate: job.unit === 'IOPS' ? done.iops : done.bw_bytes / 1e6,
    serverUs: spent === null ? null : spent / 1000 / done.total_ios,
  };
}

/** On-processor time of all threads of a process. */
function cpuNanoseconds(pid: number): number {
  let sum = 0;
  for (const thread of readdirSync(`/proc/${pid}/task`)) {
    try {
      sum += Number(readFileSync(`/proc/${pid}/task/${thread}/schedstat`, 'utf8').split(' ', 1)[0]);
    } catch {
      // it ended
    }
  }
  return sum;
}
