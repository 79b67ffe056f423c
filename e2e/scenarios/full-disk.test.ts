/** The disk under the store is full: while preparing, while writing, while sealing. Each time a typed error that names the
 * snapshot, nothing lost, nothing leaked, and the same call works once there is space again. */
import assert from 'node:assert/strict';
import { closeSync, fsyncSync, openSync, readFileSync, rmSync, writeFileSync, writeSync } from 'node:fs';
import path from 'node:path';
import { describe, it } from 'node:test';
import { status } from '@grpc/grpc-js';
import { mounted, mountTable, unmount } from '../harness/mounts.ts';
import { isErrno, run, runAny, until } from '../harness/processes.ts';
import { removeAll, untilNothingIsLeft } from '../harness/settled.ts';
import { Blockd, Snapshotter } from '../harness/snapshotter.ts';
import { Workdir } from '../harness/workdir.ts';
import { localCommitPathLabel, refused, writableLabel } from './stand.ts';
import { sha256 } from './trees.ts';

const MiB = 1 << 20;

/** A file system of its own for the store, small enough to fill in a moment: ext4 on a loop device. */
class SmallDisk {
  readonly mountPoint: string;
  readonly #ballast: string;

  private constructor(mountPoint: string) {
    this.mountPoint = mountPoint;
    this.#ballast = path.join(mountPoint, 'ballast');
  }

  static async make(work: Workdir, name: string, sizeMiB: number): Promise<SmallDisk> {
    const file = path.join(work.path, 'small-disk.img');
    await run('truncate', ['--size', `${sizeMiB}M`, file]);
    await run('mkfs.ext4', ['-q', '-m', '0', file]);
    const mountPoint = work.dir(name);
    await run('mount', ['-o', 'loop', file, mountPoint]);
    work.defer(`unmount ${mountPoint}`, () => unmount(mountPoint));
    return new SmallDisk(mountPoint);
  }

  /** Takes all the space that is left, but `leaveMiB`. */
  async fill(leaveMiB = 0): Promise<void> {
    const fd = openSync(this.#ballast, 'a');
    try {
      for (const size of [MiB, 4096, 512]) {
        const block = Buffer.alloc(size, 'b');
        for (;;) {
          try {
            writeSync(fd, block);
          } catch (error) {
            if (!isErrno(error, 'ENOSPC')) throw error;
            break;
          }
        }
        fsyncSync(fd);
      }
    } finally {
      closeSync(fd);
    }
    if (leaveMiB > 0) await run('truncate', ['--size', `-${leaveMiB}M`, this.#ballast]);
  }

  free(): void {
    rmSync(this.#ballast, { force: true });
  }
}

async function onSmallDisk(
  name: string,
  body: (at: {
    readonly work: Workdir;
    readonly disk: SmallDisk;
    readonly snapshotter: Snapshotter;
    readonly client: ReturnType<Snapshotter['client']>;
  }) => Promise<void>,
): Promise<void> {
  await using work = new Workdir(`full-${name}`);
  // The snapshotter's folder lies on it, so the store and its database fill up together, as on a real node.
  const disk = await SmallDisk.make(work, 'store', 96);
  const blockd = await Blockd.start(work);
  const snapshotter = await Snapshotter.start(work, blockd, {
    name: 'store',
    workerConfig: { defaultVirtualSizeGB: 1 },
  });
  using client = snapshotter.client();
  try {
    await body({ work, disk, snapshotter, client });
  } finally {
    disk.free();
    for (const line of mountTable().filter((entry) => entry.mountPoint.startsWith(work.dir('targets'))))
      await unmount(line.mountPoint);
    if (snapshotter.daemon.exit !== null) await snapshotter.start();
    await removeAll(client);
    await untilNothingIsLeft(snapshotter, client);
    await snapshotter.stop();
    await blockd.daemon.stop();
  }
}

for (const mode of ['dev', 'dir', 'overlayfs'] as const) {
  describe(`a full disk, ${mode}`, () => {
    const labels: Readonly<Record<string, string>> = mode === 'overlayfs' ? {} : { [writableLabel]: mode };

    it('while preparing: the call is refused by name, and works once there is space', async () => {
      await onSmallDisk(`prepare-${mode}`, async ({ disk, client }) => {
        await client.prepare('earlier', '', labels);
        await disk.fill();
        // Without a device a Prepare may still fit into the blocks the database has.
        const outcomes: string[] = [];
        for (let index = 0; index < 60 && outcomes.length === 0; index++) {
          const key = `crowded-${index}`;
          await client.prepare(key, '', labels).catch((error: { code: status; details: string }) => {
            assert.equal(status[error.code], 'RESOURCE_EXHAUSTED', error.details);
            assert.match(error.details, new RegExp(key));
            outcomes.push(key);
          });
        }
        const [key] = outcomes;
        if (mode !== 'overlayfs') assert.ok(key !== undefined, 'a writable device needs space');
        assert.equal((await client.stat('earlier')).name, 'earlier', 'reading goes on');
        assert.equal((await client.mounts('earlier')).length, 1);
        disk.free();
        if (key !== undefined) {
          await refused(client.stat(key), status.NOT_FOUND);
          assert.equal((await client.prepare(key, '', labels)).length, 1);
        }
      });
    });

    if (mode !== 'overlayfs') {
      it('while writing: the writer is told, what was flushed stays, and writing goes on once there is space', async () => {
        await onSmallDisk(`write-${mode}`, async ({ work, disk, client }) => {
          const target = path.join(work.dir('targets'), 'one');
          const safe = Buffer.alloc(2 * MiB, 's');
          {
            await using _mounted = await mounted(work, await client.prepare('writer', '', labels), target);
            writeFileSync(path.join(target, 'safe'), safe, { flush: true });
            await disk.fill(1);
            const told = await runAny('dd', [
              'if=/dev/urandom',
              `of=${target}/too-much`,
              'bs=1M',
              'count=32',
              'conv=fsync',
            ]);
            assert.notEqual(told.code, 0, 'the writer learns that its data is not safe');
            assert.match(told.stderr, /No space left|Input\/output error|Read-only/);
            disk.free();
          }
          if (mode === 'dev') {
            // After write errors a file system is checked, as on any disk; what was flushed is there.
            const [mount] = await client.mounts('writer');
            const repaired = await runAny('e2fsck', ['-f', '-y', mount?.source ?? '']);
            assert.ok(repaired.code <= 1, repaired.stdout);
            await using _mounted = await mounted(work, await client.mounts('writer'), target);
            assert.equal(sha256(readFileSync(path.join(target, 'safe'))), sha256(safe));
            writeFileSync(path.join(target, 'more'), safe, { flush: true });
            assert.equal(sha256(readFileSync(path.join(target, 'more'))), sha256(safe));
          }
        });
      });

      it('while sealing: the commit is refused or finished later, and no data is lost', async () => {
        await onSmallDisk(`seal-${mode}`, async ({ work, disk, client }) => {
          const target = path.join(work.dir('targets'), 'one');
          const safe = Buffer.alloc(2 * MiB, 's');
          {
            await using _mounted = await mounted(work, await client.prepare('writer', '', labels), target);
            writeFileSync(path.join(target, 'safe'), safe, { flush: true });
          }
          await disk.fill();
          const refusal = await client.commit('sealed', 'writer', labels).then(
            () => null,
            (error: { code: status; details: string }) => error,
          );
          if (refusal !== null) {
            assert.equal(status[refusal.code], 'RESOURCE_EXHAUSTED', refusal.details);
            assert.match(refusal.details, /writer|sealed/);
          }
          disk.free();
          if (refusal !== null) await client.commit('sealed', 'writer', labels);
          const sealed = await until(
            'the seal is finished',
            async () => (await client.stat('sealed')).labels[localCommitPathLabel],
          );
          assert.match(sealed, /overlaybd\.sealed$/);
          await using _child = await mounted(work, await client.view('child', 'sealed'), target);
          assert.equal(sha256(readFileSync(path.join(target, 'safe'))), sha256(safe));
        });
      });
    }
  });
}
