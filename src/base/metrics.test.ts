// Invariants: the original's names and buckets; alive means 1; a port that is taken costs the metrics, not the daemon.
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { createLog } from './log.ts';
import { Metrics } from './metrics.ts';

function logTo(lines: string[]) {
  return createLog({ name: 'test', level: 'debug', reportCaller: false }, { write: (line) => void lines.push(line) });
}

describe('metrics', () => {
  it('has the names of the original', async () => {
    const metrics = new Metrics();
    metrics.alive(true);
    metrics.observe('Prepare', 0.00015, false);
    metrics.observe('Walk', 100, true);
    const text = await metrics.text();
    assert.match(text, /^is_alive 1$/m);
    assert.match(text, /^grpc_error_count\{function="Walk"\} 1$/m);
    assert.match(text, /^grpc_error_count\{function="Prepare"\} 0$/m);
    assert.match(text, /^grpc_latency_seconds_bucket\{le="0.0002",function="Prepare"\} 1$/m);
    assert.equal(text.match(/^grpc_latency_seconds_bucket\{.*function="Prepare"\}/gm)?.length, 21);
    assert.match(text, /^grpc_latency_seconds_bucket\{le="52.4288",function="Walk"\} 0$/m);
    assert.match(text, /^process_cpu_seconds_total /m);
    metrics.alive(false);
    assert.match(await metrics.text(), /^is_alive 0$/m);
  });

  it('asks the stores at the moment of the scrape', async () => {
    const metrics = new Metrics();
    let snapshots = 1;
    metrics.watchStores([
      { name: 's', read: () => ({ snapshots, unsettled: 2, pending: 3, devices: { attached: 4, mounted: 5 } }) },
    ]);
    snapshots = 7;
    const text = await metrics.text();
    assert.match(text, /^overlaybd_worker_snapshots\{store="s"\} 7$/m);
    assert.match(text, /^overlaybd_worker_devices\{store="s",state="mounted"\} 5$/m);
  });

  it('is served at its path only', async () => {
    const lines: string[] = [];
    const metrics = new Metrics();
    await metrics.serve({ host: '127.0.0.1', port: 0, path: '/m' }, logTo(lines));
    const at = (path: string, method = 'GET') => fetch(`http://127.0.0.1:${metrics.port}${path}`, { method });
    const answer = await at('/m?x=1');
    assert.match(answer.headers.get('content-type') ?? '', /^text\/plain/);
    assert.match(await answer.text(), /is_alive/);
    assert.equal((await at('/')).status, 404);
    assert.equal((await at('/m', 'POST')).status, 405);

    const second = new Metrics();
    await second.serve({ host: '127.0.0.1', port: metrics.port ?? 0, path: '/m' }, logTo(lines));
    assert.equal(second.port, null);
    assert.match(lines.at(-1) ?? '', /"level":"error".*metrics are not served/);
    await metrics.close();
    await second.close();
  });
});
