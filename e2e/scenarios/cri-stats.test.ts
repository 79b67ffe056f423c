/** A16: with its Kubernetes interface on, containerd asks for Stat and Usage of every snapshot every ten seconds. What that
 * costs us is printed; asserted is only that no call fails or waits behind the others. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { it, type TestContext } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { SnapshotsClient } from '../harness/rpc-client.ts';
import { Stand, told } from './stand.ts';

const snapshots = 2000;
const seconds = process.env['DOSE'] === 'long' ? 300 : 60;
/** Far above what an unloaded machine needs: only a call that is locked out for good takes longer. */
const stallMs = 10_000;

/** User and system time of the process so far. Ticks are 10 ms. */
function cpuMs(pid: number): number {
  const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return (Number(fields[11]) + Number(fields[12])) * 10;
}

it(
  `the statistics loop over ${snapshots} snapshots runs without an error or a stall for ${seconds} s`,
  told(async (t: TestContext) => {
    await using stand = await Stand.start('cri-stats', { containerd: 'cri' });
    // The loop looks at the namespace of Kubernetes.
    using cri = new SnapshotsClient(stand.containerd.address, { headers: { 'containerd-namespace': 'k8s.io' } });
    const labels = { 'containerd.io/gc.root': 'kept by the scenario' };
    const began = performance.now();
    await cri.prepare('layer-active', '', labels);
    await cri.commit('layer', 'layer-active', labels);
    const keys = Array.from({ length: snapshots }, (_, index) => `container-${index}`);
    for (let start = 0; start < keys.length; start += 16) {
      await Promise.all(keys.slice(start, start + 16).map((key) => cri.prepare(key, 'layer', labels)));
    }
    t.diagnostic(`prepared ${snapshots} snapshots through containerd in ${Math.round(performance.now() - began)} ms`);

    const { pid } = stand.snapshotter.daemon;
    const half = seconds * 500;
    const load = async (during: () => Promise<unknown>): Promise<string> => {
      const [cpuBefore, start] = [cpuMs(pid), performance.now()];
      await during();
      return (((cpuMs(pid) - cpuBefore) / (performance.now() - start)) * 100).toFixed(1);
    };
    t.diagnostic(
      `the loop alone: snapshotter CPU ${await load(() => delay(half))} % of one core over ${half / 1000} s`,
    );

    const latencies: number[] = [];
    const probed = await load(async () => {
      for (const end = performance.now() + half; performance.now() < end; ) {
        const key = `probe-${latencies.length}`;
        const asked = performance.now();
        await cri.prepare(key, 'layer', labels);
        await cri.mounts(key);
        await cri.remove(key);
        latencies.push(performance.now() - asked);
        await delay(200);
      }
    });
    const worst = Math.max(...latencies);
    t.diagnostic(
      `with ${latencies.length} containers coming and going: CPU ${probed} %, slowest ${Math.round(worst)} ms`,
    );
    assert.ok(worst < stallMs, `a call waited ${Math.round(worst)} ms`);

    // Off the books before the stand empties the default namespace.
    for (let from = 0; from < keys.length; from += 64) {
      await Promise.all(keys.slice(from, from + 64).map((key) => cri.remove(key)));
    }
    await cri.remove('layer');
  }),
);
