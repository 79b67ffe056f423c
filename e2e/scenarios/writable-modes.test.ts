/** A9: containers on writable block devices: the mount table shows them, data survives stop and start of the task, a
 * commit yields a sealed layer with the data in it, and its export has one digest. */
import assert from 'node:assert/strict';
import { existsSync, readFileSync } from 'node:fs';
import path from 'node:path';
import { describe, it } from 'node:test';
import { mount, mountTable, unmount } from '../harness/mounts.ts';
import { run, until } from '../harness/processes.ts';
import { binDir } from '../harness/snapshotter.ts';
import { busyboxImage, push } from './images.ts';
import { localCommitPathLabel, Stand, told, writableLabel } from './stand.ts';
import { sha256 } from './trees.ts';

async function stopTask(stand: Stand, id: string): Promise<void> {
  await stand.ctr('tasks', 'kill', '--signal', 'SIGKILL', id);
  await until(`${id} has stopped`, async () => (await stand.containerd.tasks()).get(id)?.status === 'STOPPED');
  await stand.ctr('tasks', 'rm', id);
}

for (const writableLayerType of ['append', 'sparse'] as const) {
  for (const defaultFsType of ['ext4', 'xfs'] as const) {
    describe(`a container on a writable device, ${writableLayerType}, ${defaultFsType}`, () => {
      for (const mode of ['dev', 'dir'] as const) {
        it(
          `in ${mode} mode keeps its data over a restart and commits it`,
          told(async () => {
            await using stand = await Stand.start(`rw-${mode}`, {
              containerd: 'plain',
              registry: true,
              ociLayers: 'block',
              writableLayerType,
              defaultFsType,
            });
            const { work, client } = stand;
            const reference = await push(stand.registry.host, 't/bb', 'latest', await busyboxImage(work));
            await stand.ctr('images', 'pull', '--plain-http', '--snapshotter', 'overlaybd', reference);
            const label = `${writableLabel}=${mode}`;
            await stand.ctr(
              'run',
              '-d',
              '--snapshotter',
              'overlaybd',
              '--snapshotter-label',
              label,
              reference,
              'c1',
              '/bin/sleep',
              '600',
            );

            const task = (await stand.containerd.tasks()).get('c1');
            assert.ok(task !== undefined);
            const root = mountTable(task.pid).find((line) => line.mountPoint === '/');
            assert.equal(root?.fsType, defaultFsType);
            assert.match(root.source, /^\/dev\//);
            assert.ok(root.options.includes('rw'));
            const served = await stand.devices();
            assert.ok(served.some((device) => device.path === root.source && !device.readOnly));

            const exec = (...command: string[]): Promise<string> =>
              stand.ctr('tasks', 'exec', '--exec-id', 'e', 'c1', ...command);
            await exec(
              '/bin/sh',
              '-c',
              'echo kept > /data/file && dd if=/dev/urandom of=/data/noise bs=1M count=8 2>/dev/null && sync',
            );
            const noise = (await exec('/bin/md5sum', '/data/noise')).trim();
            await stopTask(stand, 'c1');
            await stand.ctr('tasks', 'start', '-d', 'c1');
            assert.equal(await exec('/bin/cat', '/data/file'), 'kept\n');
            assert.equal((await exec('/bin/md5sum', '/data/noise')).trim(), noise);
            await stopTask(stand, 'c1');

            await stand.ctr('snapshots', '--snapshotter', 'overlaybd', 'commit', 'committed', 'c1');
            const info = JSON.parse(
              await stand.ctr('snapshots', '--snapshotter', 'overlaybd', 'info', 'committed'),
            ) as {
              readonly Labels: Readonly<Record<string, string>>;
            };
            const sealed = info.Labels[localCommitPathLabel] ?? '';
            assert.match(sealed, /\/snapshots\/\d+\/fs\/overlaybd\.sealed$/);
            await until('the sealed layer is in its place', () => existsSync(sealed));
            const digests = [];
            for (const name of ['once', 'twice']) {
              const out = path.join(work.dir('export'), name);
              await run(path.join(binDir, 'overlaybd-commit'), ['--commit_sealed', sealed, out, '-z', '-t']);
              digests.push(sha256(readFileSync(out)));
            }
            assert.equal(digests[0], digests[1]);

            // A second container from the committed snapshot sees the data, in the same mode.
            const name =
              (await client.list('kind==committed')).find((row) => row.name.endsWith('/committed'))?.name ?? '';
            const target = work.dir('child');
            await mount(await client.prepare('child', name, { [writableLabel]: mode }), target);
            try {
              assert.equal(readFileSync(path.join(target, 'data/file'), 'utf8'), 'kept\n');
              assert.ok(
                (await run('md5sum', [path.join(target, 'data/noise')])).startsWith(noise.split(' ')[0] ?? '?'),
              );
            } finally {
              await unmount(target);
            }
            await client.remove('child');
          }),
        );
      }
    });
  }
}
