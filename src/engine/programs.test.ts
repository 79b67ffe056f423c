// Invariants: a child never outlives its deadline, not even its grandchildren; its output never fills our memory; an
// error says what the program said.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, it } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import { runProgram, startDaemon } from './programs.ts';
import { isGone, makeScratch } from './scratch.test.ts';

const kind = (expected: ErrorKind) => (error: unknown) => error instanceof SnapshotterError && error.kind === expected;

describe('a program', () => {
  it('gives back what it wrote', async () => {
    const { stdout, stderr } = await runProgram('sh', ['-c', 'echo out; echo err >&2'], { timeoutMs: 10_000 });
    assert.equal(stdout, 'out\n');
    assert.equal(stderr, 'err\n');
  });

  it('that fails has its words and its exit code in the error', async () => {
    const run = runProgram('sh', ['-c', 'echo no such pool >&2; exit 3'], { timeoutMs: 10_000 });
    await assert.rejects(run, /sh: exit code 3: no such pool/);
  });

  it('that is not installed is Unavailable and named', async () => {
    const run = runProgram('mkfs.nonesuch', [], { timeoutMs: 10_000 });
    await assert.rejects(run, (error) => kind(ErrorKind.Unavailable)(error) && /mkfs\.nonesuch/.test(String(error)));
  });

  it('that hangs dies at its deadline, with its children', async (t) => {
    const marker = join(makeScratch(t), 'pid');
    const run = runProgram('sh', ['-c', `sleep 1000 & echo $! > ${marker}; wait`], { timeoutMs: 300 });
    await assert.rejects(run, kind(ErrorKind.DeadlineExceeded));
    const pid = readFileSync(marker, 'utf8').trim();
    assert.ok(await isGone(Number(pid)), `grandchild ${pid} lives on`);
  });

  it('dies when the caller cancels', async () => {
    const caller = new AbortController();
    const run = runProgram('sleep', ['1000'], { timeoutMs: 60_000, signal: caller.signal });
    caller.abort();
    await assert.rejects(run, kind(ErrorKind.Cancelled));
  });

  it('that talks without end is kept to its share', async () => {
    const run = runProgram('sh', ['-c', 'head -c 50000000 /dev/zero'], { timeoutMs: 30_000, outputMaxBytes: 1000 });
    assert.equal((await run).stdout.length, 1000 + '… (cut)'.length);
  });

  it('sees nothing of our environment', async () => {
    process.env['OBD_TEST_SECRET'] = 'x';
    const { stdout } = await runProgram('env', [], { timeoutMs: 10_000 });
    assert.doesNotMatch(stdout, /OBD_TEST_SECRET/);
  });
});

describe('a daemon', () => {
  it('has a session of its own, writes to its log and tells how it ended', async (t) => {
    const log = join(makeScratch(t), 'log');
    // Field 6 of stat is the session.
    const daemon = await startDaemon('sh', ['-c', 'cut -d" " -f6 /proc/$$/stat; exit 7'], log);
    for (let i = 0; daemon.ended() === null && i < 500; i++) await delay(10);
    assert.equal(daemon.ended(), 'exit code 7');
    assert.equal(readFileSync(log, 'utf8').trim(), String(daemon.pid));
  });

  it('that is not there is Unavailable', async (t) => {
    const start = startDaemon('/nonesuch/blockd', [], join(makeScratch(t), 'log'));
    await assert.rejects(start, kind(ErrorKind.Unavailable));
  });
});
