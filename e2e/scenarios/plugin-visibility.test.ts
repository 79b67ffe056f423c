/** A3: containerd sees the plugin; while the daemon is down calls say so; afterwards they work without a restart. */
import assert from 'node:assert/strict';
import { it } from 'node:test';
import { Stand, told } from './stand.ts';

it(
  'containerd lists the plugin as ok, reports it unavailable while it is down, and finds it again',
  told(async () => {
    await using stand = await Stand.start('visibility', { containerd: 'plain' });
    const snapshots = ['snapshots', '--snapshotter', 'overlaybd'];
    assert.match(await stand.ctr('plugins', 'ls'), /^io\.containerd\.snapshotter\.v1\s+overlaybd\s+.*\bok\s*$/m);
    await stand.ctr(...snapshots, 'prepare', 'before', '');
    const pid = stand.containerd.daemon.pid;

    await stand.snapshotter.stop();
    assert.deepEqual(stand.snapshotter.daemon.exit, { code: 0, signal: null });
    assert.match(await stand.ctr('plugins', 'ls'), /^io\.containerd\.snapshotter\.v1\s+overlaybd\s+.*\bok\s*$/m);
    for (const call of [['ls'], ['prepare', 'during', ''], ['info', 'before']]) {
      const answer = await stand.containerd.ctrAny([...snapshots, ...call]);
      assert.notEqual(answer.code, 0);
      assert.match(answer.stderr, /unavailable/i);
    }

    await stand.startAgain();
    // containerd reconnects with a back-off of at most 3 s; the first calls may still meet it.
    for (let round = 0; ; round++) {
      const answer = await stand.containerd.ctrAny([...snapshots, 'ls']);
      if (answer.code === 0) {
        assert.match(answer.stdout, /^before\s/m);
        assert.doesNotMatch(answer.stdout, /^during\s/m);
        break;
      }
      assert.ok(round < 100 && /unavailable/i.test(answer.stderr), answer.stderr);
    }
    await stand.ctr(...snapshots, 'prepare', 'after', '');
    assert.equal(stand.containerd.daemon.pid, pid);
    assert.equal(stand.containerd.daemon.exit, null);
  }),
);

it(
  'a stale socket file does not keep the daemon from starting',
  told(async () => {
    await using stand = await Stand.start('stale-socket');
    await stand.client.prepare('kept');
    await stand.snapshotter.kill();
    await stand.startAgain();
    assert.equal((await stand.client.stat('kept')).name, 'kept');
  }),
);
