/** The snapshotter ends in order with calls in flight, or by kill -9 in the middle of a verb. After a restart the same call
 * works or was done, Mounts are equal, devices live on, and nothing is leaked (the stand checks that at its end). */
import assert from 'node:assert/strict';
import { readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { describe, it, type TestContext } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { status } from '@grpc/grpc-js';
import { mounted } from '../harness/mounts.ts';
import { run } from '../harness/processes.ts';
import { refused, Stand, seededRandom, told, writableLabel } from './stand.ts';

const rounds = process.env['DOSE'] === 'long' ? 25 : 4;
const modes = ['overlayfs', 'dir', 'dev'] as const;
const labelsOf = (mode: string): Readonly<Record<string, string>> =>
  mode === 'overlayfs' ? {} : { [writableLabel]: mode };

/** The code a call ended with; a connection that broke under it counts as Unavailable or Cancelled, whatever grpc-js says. */
const codeOf = (call: Promise<unknown>): Promise<status> =>
  call.then(
    () => status.OK,
    (error: { code?: status }) => error.code ?? status.UNKNOWN,
  );

describe('an orderly end', () => {
  it(
    'SIGTERM drains the calls in flight, exits 0, and detaches nothing',
    told(async () => {
      await using stand = await Stand.start('sigterm');
      const { client, snapshotter, work } = stand;
      await client.prepare('layer-active', '', labelsOf('dev'));
      const mounts = await client.mounts('layer-active');
      const target = work.dir('mounted');
      await using _mounted = await mounted(work, mounts, target);
      writeFileSync(path.join(target, 'file'), 'written before\n');
      const devices = await stand.devices();

      const calls = Array.from({ length: 6 }, (_, index) =>
        codeOf(client.prepare(`in-flight-${index}`, '', labelsOf('dir'))),
      );
      await delay(20);
      await snapshotter.stop();
      assert.deepEqual(snapshotter.daemon.exit, { code: 0, signal: null });
      const codes = await Promise.all(calls);
      for (const code of codes)
        assert.ok([status.OK, status.UNAVAILABLE, status.CANCELLED].includes(code), status[code]);

      // The device serves on while nobody is there to decide.
      writeFileSync(path.join(target, 'meanwhile'), 'written while it was down\n');
      await run('sync', ['-f', path.join(target, 'meanwhile')]);
      const served = (await stand.devices()).map((device) => device.path);
      for (const device of devices) assert.ok(served.includes(device.path));

      await stand.startAgain();
      assert.deepEqual(await client.mounts('layer-active'), mounts);
      assert.equal(readFileSync(path.join(target, 'meanwhile'), 'utf8'), 'written while it was down\n');
      for (const [index, code] of codes.entries()) {
        const key = `in-flight-${index}`;
        const again = await codeOf(client.prepare(key, '', labelsOf('dir')));
        assert.equal(again, code === status.OK ? status.ALREADY_EXISTS : again);
        assert.ok(again === status.OK || again === status.ALREADY_EXISTS, status[again]);
        assert.equal((await client.mounts(key)).length, 1);
      }
    }),
  );
});

describe('kill -9 of the snapshotter', () => {
  for (const mode of modes) {
    it(
      `in the middle of Prepare, Commit and Remove, ${mode}: the same call works after a restart`,
      told(async (t: TestContext) => {
        await using stand = await Stand.start(`kill-${mode}`);
        const { client, snapshotter } = stand;
        const { next } = seededRandom();
        const seen = new Map<string, number>();

        /** Sends the call, kills the daemon somewhere in it, restarts, sends it again; returns how the repeat ended. */
        const interrupted = async (verb: string, call: () => Promise<unknown>): Promise<status> => {
          // A first answer takes a few milliseconds without a device and some hundred with one.
          const afterMs = next(mode === 'overlayfs' ? 12 : 250);
          const first = codeOf(call());
          await delay(afterMs);
          await snapshotter.kill();
          const firstCode = await first;
          await stand.startAgain();
          const again = await codeOf(call());
          const outcome = `${verb}: first ${status[firstCode]}, again ${status[again]}`;
          seen.set(outcome, (seen.get(outcome) ?? 0) + 1);
          return again;
        };
        const oneOf = (code: status, ...allowed: status[]): void =>
          assert.ok(allowed.includes(code), `${status[code]}`);

        for (let round = 0; round < rounds; round++) {
          const [active, name, child] = [`active-${round}`, `name-${round}`, `child-${round}`];
          oneOf(
            await interrupted('Prepare', () => client.prepare(active, '', labelsOf(mode))),
            status.OK,
            status.ALREADY_EXISTS,
          );
          const mounts = await client.mounts(active);
          assert.equal(mounts.length, 1);
          const target = stand.work.dir(`target-${round}`);
          {
            await using _mounted = await mounted(stand.work, mounts, target);
            writeFileSync(path.join(target, 'file'), `round ${round}\n`);
          }
          oneOf(
            await interrupted('Commit', () => client.commit(name, active, labelsOf(mode))),
            status.OK,
            status.NOT_FOUND,
            status.ALREADY_EXISTS,
          );
          assert.equal((await client.stat(name)).name, name);
          await refused(client.stat(active), status.NOT_FOUND);
          oneOf(
            await interrupted('Prepare', () => client.prepare(child, name, labelsOf(mode))),
            status.OK,
            status.ALREADY_EXISTS,
          );
          {
            await using _mounted = await mounted(stand.work, await client.mounts(child), target);
            assert.equal(readFileSync(path.join(target, 'file'), 'utf8'), `round ${round}\n`);
          }
          oneOf(await interrupted('Remove', () => client.remove(child)), status.OK, status.NOT_FOUND);
          await refused(client.stat(child), status.NOT_FOUND);
        }
        for (const [outcome, count] of seen) t.diagnostic(`${count} × ${outcome}`);
      }),
    );
  }
});
