/** Runs containerd's conformance suite in every way the contract asks for, and prints a table.
 *
 *   node e2e/conformance/run.ts [--only NAME[,NAME…]] [--repeat N] [--parallel N] [--tally PREFIX]
 *
 * Names: overlayfs/append … dev/sparse (over our socket), overlayfs/containerd, dir/containerd, dev/containerd, and
 * `reference`: containerd's own overlayfs snapshotter, which checks this harness and is never part of "all".
 * A sub-test that fails in any repeat fails the run. */
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { createWriteStream, existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { Containerd } from '../harness/containerd.ts';
import { run } from '../harness/processes.ts';
import { untilNothingIsLeft } from '../harness/settled.ts';
import { Blockd, binDir, isBuilt, Snapshotter, type SnapshotterOptions } from '../harness/snapshotter.ts';
import { repository, Workdir } from '../harness/workdir.ts';

type Mode = 'overlayfs' | 'dir' | 'dev';

interface Combination {
  readonly name: string;
  readonly through: 'socket' | 'containerd' | 'reference';
  readonly mode: Mode;
  readonly type: 'append' | 'sparse';
}

type Outcome = 'PASS' | 'FAIL' | 'SKIP';

interface Result {
  readonly combination: Combination;
  readonly outcomes: ReadonlyMap<string, readonly Outcome[]>;
  readonly skipReasons: ReadonlyMap<string, string>;
  readonly seconds: readonly number[];
  /** Output of the repeats that failed. */
  readonly complaints: readonly string[];
}

const modes: readonly Mode[] = ['overlayfs', 'dir', 'dev'];
const combinations: readonly Combination[] = [
  ...modes.flatMap((mode) =>
    (['append', 'sparse'] as const).map(
      (type) => ({ name: `${mode}/${type}`, through: 'socket', mode, type }) as const,
    ),
  ),
  ...modes.map((mode) => ({ name: `${mode}/containerd`, through: 'containerd', mode, type: 'append' }) as const),
];
const reference: Combination = { name: 'reference', through: 'reference', mode: 'overlayfs', type: 'append' };

/** Debian's Go; another one in PATH may refuse GOPATH mode or the sources of 1.6.20. */
const goRoot = '/usr/lib/go-1.19';

async function buildSuite(): Promise<string> {
  const source = path.join(repository, 'e2e/conformance/suite_test.go');
  const out = path.join(repository, 'build/conformance');
  const version = await run('dpkg-query', ['-W', 'golang-github-containerd-containerd-dev']);
  const digest = createHash('sha256').update(version).update(readFileSync(source)).digest('hex').slice(0, 16);
  const suite = path.join(out, `suite-${digest}.test`);
  if (existsSync(suite)) return suite;
  mkdirSync(path.join(out, 'gopath'), { recursive: true });
  await run(path.join(goRoot, 'bin/go'), ['test', '-c', '-o', suite, '.'], {
    cwd: path.dirname(source),
    timeoutMs: 600_000,
    env: {
      GOROOT: goRoot,
      GO111MODULE: 'off',
      GOFLAGS: '',
      GOWORK: 'off',
      GOPATH: `${path.join(out, 'gopath')}:/usr/share/gocode`,
      GOCACHE: path.join(out, 'cache'),
    },
  });
  return suite;
}

/** In the block modes the name must not excuse us from renaming directories over lower layers. */
const suiteName = (mode: Mode): string => (mode === 'overlayfs' ? 'overlayfs' : `overlaybd-${mode}`);

async function runCombination(
  suite: string,
  combination: Combination,
  repeats: number,
  parallel: number,
): Promise<Result> {
  await using work = new Workdir('conformance');
  const base = { suiteName: suiteName(combination.mode) };
  const settings = await prepareTarget(work, combination);
  const outcomes = new Map<string, Outcome[]>();
  const skipReasons = new Map<string, string>();
  const seconds: number[] = [];
  const complaints: string[] = [];
  for (let repeat = 1; repeat <= repeats; repeat++) {
    const start = performance.now();
    const { code, output } = await runSuite(work, suite, { ...base, ...settings, run: String(repeat) }, parallel);
    seconds.push((performance.now() - start) / 1000);
    const seen = parseOutcomes(output);
    for (const [name, outcome] of seen.outcomes) outcomes.set(name, [...(outcomes.get(name) ?? []), outcome]);
    for (const [name, reason] of seen.skipReasons) skipReasons.set(name, reason);
    const failed = [...seen.outcomes.values()].includes('FAIL');
    // A panic or a deadline ends the binary between two sub-tests.
    if (code !== 0 && !failed)
      outcomes.set('(the suite itself)', [...(outcomes.get('(the suite itself)') ?? []), 'FAIL']);
    if (code !== 0) complaints.push(`repeat ${repeat}, exit ${code}:\n${complaint(output)}`);
  }
  return { combination, outcomes, skipReasons, seconds, complaints };
}

async function prepareTarget(work: Workdir, combination: Combination): Promise<Readonly<Record<string, unknown>>> {
  if (combination.through === 'reference') {
    const containerd = await Containerd.start(work, { plugins: [] });
    return { target: 'containerd', address: containerd.address, snapshotter: 'overlayfs' };
  }
  const blockd = await Blockd.start(work);
  const options: SnapshotterOptions = {
    rwMode: combination.mode,
    writableLayerType: combination.type,
    workerConfig: { defaultVirtualSizeGB: 1 },
  };
  if (combination.through === 'containerd') {
    const snapshotter = await Snapshotter.start(work, blockd, options);
    const containerd = await Containerd.start(work, { plugins: [{ name: 'overlaybd', address: snapshotter.address }] });
    work.defer('collect garbage', async () => {
      await containerd.ctr(['leases', 'create', '--id', 'gc']);
      await containerd.ctr(['leases', 'delete', '--sync', 'gc']);
      using client = snapshotter.client();
      await untilNothingIsLeft(snapshotter, client);
    });
    return { target: 'containerd', address: containerd.address, snapshotter: 'overlaybd' };
  }
  const template = new Snapshotter(work, blockd, options);
  return {
    target: 'daemon',
    blockd: blockd.address,
    stores: work.dir('stores'),
    sockets: work.sockets,
    command: [path.join(binDir, 'overlaybd-snapshotter')],
    config: JSON.parse(readFileSync(template.configPath, 'utf8')),
  };
}

/** The suite runs in a process group of its own, with the daemons it starts: whatever happens, the group ends with it. */
async function runSuite(
  work: Workdir,
  suite: string,
  settings: Readonly<Record<string, unknown>>,
  parallel: number,
): Promise<{ readonly code: number; readonly output: string }> {
  const log = createWriteStream(work.logPath('suite'), { flags: 'a' });
  const child = spawn(suite, ['-test.v', '-test.root', `-test.parallel=${parallel}`, '-test.timeout=900s'], {
    cwd: work.path,
    env: { ...process.env, OBD_SUITE: JSON.stringify(settings), TMPDIR: work.dir('tmp') },
    stdio: ['ignore', 'pipe', 'pipe'],
    detached: true,
  });
  const endGroup = (): void => {
    try {
      if (child.pid !== undefined) process.kill(-child.pid, 'SIGKILL');
    } catch {
      // gone: all of it ended in order
    }
  };
  work.defer('end the suite', endGroup);
  const chunks: Buffer[] = [];
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (chunk: Buffer) => {
      chunks.push(chunk);
      log.write(chunk);
    });
  }
  const { promise, resolve, reject } = Promise.withResolvers<number>();
  child.on('error', reject);
  child.on('exit', (code) => resolve(code ?? 128));
  const code = await promise;
  endGroup();
  log.end();
  return { code, output: Buffer.concat(chunks).toString() };
}

function parseOutcomes(output: string): {
  readonly outcomes: ReadonlyMap<string, Outcome>;
  readonly skipReasons: ReadonlyMap<string, string>;
} {
  const outcomes = new Map<string, Outcome>();
  const skipReasons = new Map<string, string>();
  const lines = output.split('\n');
  // Log lines come under a heading that names the sub-test: several run at once.
  const logged = new Map<string, string>();
  let speaker = '';
  for (const line of lines) {
    const heading = /^=== (?:RUN|CONT|NAME)\s+TestConformance\/(\S+)/.exec(line);
    const result = /^\s+--- (PASS|FAIL|SKIP): TestConformance\/(\S+)/.exec(line);
    const text = reasonIn(line);
    if (heading !== null) speaker = heading[1] ?? '';
    else if (result !== null) {
      const [, outcome, name = ''] = result;
      outcomes.set(name, outcome as Outcome);
      if (outcome === 'SKIP') skipReasons.set(name, logged.get(name) ?? 'no reason given');
    } else if (text !== undefined) logged.set(speaker, text);
  }
  return { outcomes, skipReasons };
}

function reasonIn(line: string): string | undefined {
  return /^\s+\S+\.go:\d+: (.*)$/.exec(line)?.[1];
}

/** What a person needs of a failed run: the lines of failed sub-tests, without the log of every call. */
function complaint(output: string): string {
  const lines = output.split('\n').filter((line) => !/level=(debug|info|trace)|^=== |: unmount \//.test(line));
  return lines.slice(-200).join('\n');
}

function count(result: Result): {
  readonly passed: number;
  readonly failed: number;
  readonly skipped: number;
  readonly flaky: readonly string[];
} {
  let [passed, failed, skipped] = [0, 0, 0];
  const flaky: string[] = [];
  for (const [name, seen] of result.outcomes) {
    if (seen.includes('FAIL')) {
      failed++;
      if (seen.includes('PASS'))
        flaky.push(`${name} (${seen.filter((outcome) => outcome === 'FAIL').length}/${seen.length})`);
    } else if (seen.includes('SKIP')) skipped++;
    else passed++;
  }
  return { passed, failed, skipped, flaky };
}

async function main(): Promise<number> {
  const { values } = parseArgs({
    options: {
      only: { type: 'string' },
      repeat: {
        type: 'string',
        default: process.env['CONFORMANCE_REPEAT'] ?? (process.env['DOSE'] === 'long' ? '20' : '1'),
      },
      parallel: { type: 'string', default: '4' },
      tally: { type: 'string' },
    },
  });
  const names = values.only?.split(',');
  const known = [...combinations, reference];
  const unknown = names?.find((name) => !known.some((combination) => combination.name === name));
  const repeats = Number(values.repeat);
  const parallel = Number(values.parallel);
  if (
    unknown !== undefined ||
    !Number.isInteger(repeats) ||
    repeats < 1 ||
    !Number.isInteger(parallel) ||
    parallel < 1
  ) {
    process.stderr.write(
      `usage: --only one of ${known.map(({ name }) => name).join(' ')}; --repeat and --parallel from 1\n`,
    );
    return 2;
  }
  const chosen = names === undefined ? combinations : known.filter(({ name }) => names.includes(name));
  if (chosen.some(({ through }) => through !== 'reference') && !isBuilt()) {
    process.stderr.write(`${binDir}: not built yet, run \`make build\`\n`);
    return 1;
  }
  const suite = await buildSuite();
  const results: Result[] = [];
  const broken: string[] = [];
  for (const combination of chosen) {
    try {
      const result = await runCombination(suite, combination, repeats, parallel);
      results.push(result);
      for (const text of result.complaints) process.stdout.write(`--- ${combination.name}, ${text}\n`);
    } catch (error) {
      broken.push(combination.name);
      process.stdout.write(`--- ${combination.name}: ${error instanceof Error ? error.message : String(error)}\n`);
    }
  }

  const total = { passed: 0, failed: broken.length, skipped: 0 };
  const skips: string[] = [];
  process.stdout.write(
    `${'mode / type'.padEnd(22)} ${'pass'.padStart(5)} ${'fail'.padStart(5)} ${'skip'.padStart(5)} ${'repeats'.padStart(8)} ${'seconds'.padStart(8)}\n`,
  );
  for (const result of results) {
    const { passed, failed, skipped, flaky } = count(result);
    total.passed += passed;
    total.failed += failed;
    total.skipped += skipped;
    const perRun = result.seconds.reduce((sum, value) => sum + value, 0) / result.seconds.length;
    const note = flaky.length > 0 ? `  flaky: ${flaky.join(', ')}` : '';
    process.stdout.write(
      `${result.combination.name.padEnd(22)} ${String(passed).padStart(5)} ${String(failed).padStart(5)} ${String(skipped).padStart(5)} ${String(repeats).padStart(8)} ${perRun.toFixed(1).padStart(8)}${note}\n`,
    );
    for (const [name, reason] of result.skipReasons)
      skips.push(`conformance ${result.combination.name}: ${name}: ${reason}`);
  }
  for (const name of broken)
    process.stdout.write(`${name.padEnd(22)} could not be run or left something behind, see above\n`);
  for (const line of skips) process.stdout.write(`skipped: ${line}\n`);
  if (values.tally !== undefined) {
    writeFileSync(`${values.tally}.tally`, `${total.passed} ${total.failed} ${total.skipped}\n`);
    if (skips.length > 0) writeFileSync(`${values.tally}.skips`, `${skips.join('\n')}\n`);
  }
  return total.failed > 0 ? 1 : 0;
}

process.exitCode = await main();
