/** A10: a diff of a running container mounts its snapshot a second time. Neither side may notice the other. */
import assert from 'node:assert/strict';
import path from 'node:path';
import { it } from 'node:test';
import { run, runAny, until } from '../harness/processes.ts';
import { binDir } from '../harness/snapshotter.ts';
import { busyboxImage, push } from './images.ts';
import { localCommitPathLabel, Stand, told, writableLabel } from './stand.ts';

for (const mode of ['overlayfs', 'dir', 'dev'] as const) {
  it(
    `a diff of a running container leaves it unaffected, ${mode}`,
    told(async () => {
      await using stand = await Stand.start(`diff-${mode}`, {
        containerd: 'plain',
        registry: true,
        ociLayers: 'block',
      });
      const { work, client } = stand;
      const reference = await push(stand.registry.host, 't/bb', 'latest', await busyboxImage(work));
      await stand.ctr('images', 'pull', '--plain-http', '--snapshotter', 'overlaybd', reference);
      const label = mode === 'overlayfs' ? [] : ['--snapshotter-label', `${writableLabel}=${mode}`];
      // The container writes all the time and stops at the first error. In place and without a change of size: the
      // differ lists a file and then reads it, and takes one that is gone or grown in between for an error.
      const loop =
        'echo first > /data/first; i=0; while printf %08d $i 1<> /data/counter; do i=$((i+1)); done; echo broken > /data/broken';
      await stand.ctr('run', '-d', '--snapshotter', 'overlaybd', ...label, reference, 'c1', '/bin/sh', '-c', loop);
      const exec = (...command: string[]): Promise<string> =>
        stand.ctr('tasks', 'exec', '--exec-id', 'e', 'c1', ...command);
      const counter = async (): Promise<number> => Number((await exec('/bin/cat', '/data/counter')).trim());
      await until('the container writes', async () => (await counter()) > 0);

      const archive = path.join(work.path, 'diff.tar');
      const ctr = ['ctr', '--address', stand.containerd.address, '--namespace', stand.containerd.namespace].join(' ');
      const diff = await runAny('sh', ['-c', `${ctr} snapshots --snapshotter overlaybd diff c1 > ${archive}`]);
      if (mode === 'dev') {
        // The same file system is mounted writable in the container: the kernel refuses a read-only second mount, and
        // that is said, not papered over (clients-contract 5.6).
        assert.notEqual(diff.code, 0);
        assert.match(diff.stderr, /busy|already mounted/i);
      } else {
        assert.equal(diff.code, 0, diff.stderr);
        const names = await run('tar', ['--list', '--gzip', '--file', archive]);
        assert.match(names, /^data\/first$/m);
        assert.doesNotMatch(names, /^bin\/busybox$/m, 'only what the container changed');
      }

      const before = await counter();
      await until('the container still writes', async () => (await counter()) > before);
      await assert.rejects(exec('/bin/cat', '/data/broken'), /No such file/);

      await stand.ctr('tasks', 'kill', '--signal', 'SIGKILL', 'c1');
      await until('c1 has stopped', async () => (await stand.containerd.tasks()).get('c1')?.status === 'STOPPED');
      await stand.ctr('tasks', 'rm', 'c1');
      await stand.ctr('snapshots', '--snapshotter', 'overlaybd', 'commit', 'committed', 'c1');
      if (mode !== 'overlayfs') {
        const row = (await client.list('kind==committed')).find((info) => info.name.endsWith('/committed'));
        const sealed = row?.labels[localCommitPathLabel] ?? '';
        const config = path.join(path.dirname(path.dirname(sealed)), 'block/config.v1.json');
        const flat = path.join(work.path, 'flat.raw');
        await until('the layer is sealed', () =>
          run(path.join(binDir, 'overlaybd-export'), [config, flat]).then(() => true),
        );
        // A killed container leaves a journal to replay; after that nothing may be wrong.
        await run('e2fsck', ['-E', 'journal_only', '-p', flat]);
        await run('e2fsck', ['-f', '-n', flat]);
      }
    }),
  );
}
