/** The harness proves itself on containerd's own overlayfs snapshotter: what these tests accept from it, the scenarios
 * may demand of ours. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { Containerd } from './containerd.ts';
import { leaked, machineState, sweep } from './leaks.ts';
import { mount, mounted, mountsBelow, mountTable } from './mounts.ts';
import { CommandError, Daemon, run, runAny, until } from './processes.ts';
import { startRegistry } from './registry.ts';
import { Kind, SnapshotsClient } from './rpc-client.ts';
import { Workdir } from './workdir.ts';

test('a work directory undoes in reverse order and is gone afterwards, even when a step fails', async () => {
  const order: string[] = [];
  const work = new Workdir('harness');
  work.defer('first', () => void order.push('first'));
  work.defer('second', () => {
    throw new Error('no');
  });
  work.defer('third', () => void order.push('third'));
  assert.deepEqual(await work.close(), ['second: no']);
  assert.deepEqual(order, ['third', 'first']);
  assert.equal(existsSync(work.path), false);
  assert.equal(existsSync(work.sockets), false);
});

test('what nobody undid is removed by force and reported', async () => {
  const work = new Workdir('harness');
  const target = work.dir('forgotten');
  await mount([{ type: 'tmpfs', source: 'tmpfs', options: ['size=64k'] }], target);
  const child = spawn('sh', ['-c', `exec sleep 1000`, work.path], { stdio: 'ignore', detached: true });
  const ended = new Promise((resolve) => child.on('exit', (_, signal) => resolve(signal)));
  // `exec` drops the argument that names the directory; a shell that stays keeps it.
  const second = spawn('sh', ['-c', 'sleep 1000; true', work.path], { stdio: 'ignore', detached: true });
  const secondEnded = new Promise((resolve) => second.on('exit', (_, signal) => resolve(signal)));
  const problems = await work.close();
  assert.equal(problems.length, 2, problems.join('\n'));
  assert.deepEqual(mountsBelow(work.path), []);
  assert.equal(await secondEnded, 'SIGKILL');
  process.kill(-(second.pid ?? 0), 'SIGKILL');
  child.kill('SIGKILL');
  assert.equal(await ended, 'SIGKILL');
});

test('a socket path that does not fit sun_path is refused', async () => {
  await using work = new Workdir('harness');
  assert.throws(() => work.socket('x'.repeat(100)), /too long/);
});

test('a command that fails says which, how and why', async () => {
  await assert.rejects(run('sh', ['-c', 'echo reason >&2; exit 3']), (error) => {
    assert.ok(error instanceof CommandError);
    assert.equal(error.result.code, 3);
    assert.match(error.message, /exit 3: reason/);
    return true;
  });
  await assert.rejects(runAny('sleep', ['10'], { timeoutMs: 50 }), /not done after 50 ms/);
  await assert.rejects(runAny('/nonexistent/program', []), /ENOENT/);
});

test('waiting for a daemon that ends fails at once, with the end of its log', async () => {
  await using work = new Workdir('harness');
  const daemon = await Daemon.start(work, { name: 'short', program: 'sh', args: ['-c', 'echo last words; exit 7'] });
  const started = performance.now();
  await assert.rejects(
    daemon.ready('never', () => Promise.reject(new Error('not yet'))),
    /exit 7\n.*\nlast words/,
  );
  assert.ok(performance.now() - started < 5_000);
});

test('a new mount, loop device or process is a leak until it is gone', async () => {
  await using work = new Workdir('harness');
  const before = await machineState();
  const target = work.dir('mnt');
  await mount([{ type: 'tmpfs', source: 'tmpfs', options: [] }], target);
  const file = path.join(work.path, 'disk');
  await run('truncate', ['--size', '1M', file]);
  const node = (await run('losetup', ['--find', '--show', file])).trim();
  const left = leaked(before, await machineState(), [work.tag]);
  assert.equal(left.length, 2, left.join('\n'));
  assert.ok(left.some((line) => line.includes(node)));
  await run('losetup', ['--detach', node]);
  await run('umount', [target]);
  await until('nothing leaks', async () => leaked(before, await machineState(), [work.tag]).length === 0);
});

test('an interrupted run cleans up', async () => {
  const script = `
    const { Workdir } = await import(${JSON.stringify(path.join(import.meta.dirname, 'workdir.ts'))});
    const { mount } = await import(${JSON.stringify(path.join(import.meta.dirname, 'mounts.ts'))});
    const { Daemon } = await import(${JSON.stringify(path.join(import.meta.dirname, 'processes.ts'))});
    const work = new Workdir('harness');
    const target = work.dir('mnt');
    await mount([{ type: 'tmpfs', source: 'tmpfs', options: [] }], target);
    work.defer('unmount', () => import('node:child_process').then((m) => { m.execFileSync('umount', [target]); }));
    await Daemon.start(work, { name: 'sleeper', program: 'sleep', args: ['1000'] });
    process.stdout.write(work.path + '\\n');
    setInterval(() => {}, 1000);`;
  const child = spawn(process.execPath, ['--input-type=module', '-e', script], { stdio: ['ignore', 'pipe', 'pipe'] });
  let said = '';
  let complained = '';
  child.stdout.on('data', (chunk) => (said += chunk));
  child.stderr.on('data', (chunk) => (complained += chunk));
  const ended = new Promise((resolve) => child.on('exit', resolve));
  await until('the child is set up', () => said.includes('\n'));
  const dir = said.trim();
  assert.equal(mountTable().filter((line) => line.mountPoint.startsWith(dir)).length, 1);
  child.kill('SIGINT');
  assert.equal(await ended, 130, complained);
  assert.equal(existsSync(dir), false);
  assert.deepEqual(await sweep([path.basename(dir)]), []);
});

test('containerd and a registry start, answer and stop without a trace', async () => {
  const before = await machineState();
  let tag = '';
  {
    await using work = new Workdir('harness');
    tag = work.tag;
    const registry = await startRegistry(work);
    const containerd = await Containerd.start(work, { plugins: [] });
    assert.match(await containerd.ctr(['plugins', 'ls']), /overlayfs .*ok/);
    assert.equal((await fetch(`http://${registry.host}/v2/_catalog`)).status, 200);
    await containerd.stop();
    await containerd.start();
    assert.deepEqual(await containerd.tasks(), new Map());
    assert.deepEqual(readdirSync(work.sockets).includes('containerd.sock'), true);
  }
  await delay(0);
  assert.deepEqual(leaked(before, await machineState(), [tag]), []);
});

test('mounts get exactly their options: a read-only bind refuses writes, an overlay shows both', async () => {
  await using work = new Workdir('harness');
  const [lower, upper, scratch] = [work.dir('lower dir'), work.dir('upper'), work.dir('work')];
  writeFileSync(path.join(lower, 'file'), 'below');
  const bind = await mounted(work, [{ type: 'bind', source: lower, options: ['ro', 'rbind'] }], work.dir('bound'));
  assert.throws(() => writeFileSync(path.join(bind.path, 'file'), 'x'), /EROFS/);
  const options = ['index=off', `workdir=${scratch}`, `upperdir=${upper}`, `lowerdir=${lower}`];
  const merged = await mounted(work, [{ type: 'overlay', source: 'overlay', options }], work.dir('merged'));
  writeFileSync(path.join(merged.path, 'file'), 'above');
  assert.equal(readFileSync(path.join(lower, 'file'), 'utf8'), 'below');
  assert.equal(readFileSync(path.join(upper, 'file'), 'utf8'), 'above');
  const line = mountTable().find(({ mountPoint }) => mountPoint === merged.path);
  assert.ok(line?.superOptions.includes(`lowerdir=${lower}`), 'escapes in the mount table are decoded');
  await merged[Symbol.asyncDispose]();
  await bind[Symbol.asyncDispose]();
  assert.deepEqual(mountsBelow(work.path), []);
});

test('the client speaks the snapshots service as containerd does', async () => {
  await using work = new Workdir('harness');
  const containerd = await Containerd.start(work, { plugins: [] });
  const headers = { 'containerd-namespace': containerd.namespace };
  using client = new SnapshotsClient(containerd.address, { snapshotter: 'overlayfs', headers });
  const root = { 'containerd.io/gc.root': 'yes' };
  const mounts = await client.prepare('base-active', '', root);
  {
    await using target = await mounted(work, mounts, work.dir('mnt'));
    writeFileSync(path.join(target.path, 'file'), 'content');
  }
  await client.commit('base', 'base-active', { ...root, color: 'red' });
  assert.equal((await client.view('look', 'base', root)).length, 1);
  const info = await client.stat('base');
  assert.deepEqual([info.kind, info.parent, info.labels['color']], [Kind.COMMITTED, '', 'red']);
  const updated = await client.update('base', { color: 'blue' }, ['labels.color']);
  assert.deepEqual(updated.labels, { ...root, color: 'blue' });
  assert.deepEqual(
    (await client.list('labels.color==blue')).map(({ name }) => name),
    ['base'],
  );
  assert.deepEqual((await client.list()).map(({ name }) => name).sort(), ['base', 'look']);
  assert.ok((await client.usage('base')).sizeBytes > 0n);
  assert.deepEqual(await client.mounts('look'), await client.mounts('look'));
  await assert.rejects(client.remove('base'), { code: 9 });
  await client.remove('look');
  await client.remove('base');
  await assert.rejects(client.stat('base'), { code: 5 });
  // containerd's metadata layer does not pass it on.
  await assert.rejects(client.cleanup(), { code: 12 });
});

test('the leak check as a program: silent about what was there, exit 1 and the name of what was not', async () => {
  await using work = new Workdir('harness');
  const program = path.join(import.meta.dirname, 'leaks.ts');
  const saved = path.join(work.path, 'state.json');
  await run(process.execPath, [program, 'save', saved]);
  {
    await using target = await mounted(work, [{ type: 'tmpfs', source: 'tmpfs', options: [] }], work.dir('leak'));
    const found = await runAny(process.execPath, [program, 'check', saved]);
    assert.equal(found.code, 1);
    assert.ok(found.stdout.includes(`mounts: ${target.path} (tmpfs from tmpfs)`), found.stdout);
  }
  assert.equal((await runAny(process.execPath, [program])).code, 2);
});
