/** The border on real devices (root). Invariants: no misuse of a handle crashes the process; a handle that is dropped
 * and an environment that ends leave no idle device behind; a process that ends, however, leaves only what can be released. */
import assert from 'node:assert/strict';
import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, it } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { loadNative, type NativeAttachOptions, type NativeDevice, nativePath } from './native.ts';

describe('the native border', { timeout: 120_000 }, () => {
  const native = loadNative(nativePath());
  let dir = '';
  let options: NativeAttachOptions;
  let sequence = 0;

  beforeEach(async () => {
    dir = mkdtempSync(join(tmpdir(), 'obd-border-'));
    const upper = { data: join(dir, 'data'), index: join(dir, 'index') };
    await native.createUpper({ ...upper, virtualSizeBytes: 16n << 20n, sparse: false, parentUuid: null });
    writeFileSync(join(dir, 'config'), JSON.stringify({ repoBlobUrl: '', lowers: [], upper, resultFile: '' }));
    options = {
      configPath: join(dir, 'config'),
      readOnly: false,
      directIo: false,
      sectorSizeBytes: 4096,
      threads: 2,
      name: `overlaybd-border-${process.pid}-${sequence++}`,
      runDir: dir,
    };
  });
  afterEach(async () => {
    const left = await native.releaseStaleDevices(options.name);
    await native.removeTree(dir);
    assert.deepEqual(left, [], 'a device is left behind');
  });

  it('stops once however often and however concurrently it is told to', async () => {
    const device = await native.attachDevice(options);
    await Promise.all([
      device.stop(false),
      device.stop(true),
      device.flush().catch(() => undefined),
      device.stop(false),
    ]);
    await device.stop(false);
    assert.equal(device.isStopped(), true);
  });

  it('names the device when a stopped one is used', async () => {
    const device = await native.attachDevice(options);
    await device.stop(false);
    const expected = { code: 'failed-precondition', message: `device ${device.path} is stopped` };
    assert.throws(() => device.stats(), expected);
    await assert.rejects(device.flush(), expected);
  });

  it('needs no `this` and cannot be altered', async () => {
    const device = await native.attachDevice(options);
    const { stats, stop } = device;
    assert.equal(stats().errors, 0n);
    assert.throws(() => {
      (device as { path: string }).path = '/dev/null';
    }, TypeError);
    await stop.call({ type: 'device' } as unknown as NativeDevice, false);
  });

  /** A config without the upper that is in use. */
  const lowerOnly = (): string => {
    const path = join(dir, 'lower-only');
    const layer = fileURLToPath(new URL('../../native/testdata/fixtures/commit-raw/layer', import.meta.url));
    writeFileSync(path, JSON.stringify({ repoBlobUrl: '', lowers: [{ file: layer }], resultFile: '' }));
    return path;
  };

  it('refuses a second writer of one layer, also from another process, until the first is stopped', async () => {
    const device = await native.attachDevice(options);
    const refusal = { code: 'failed-precondition', message: /another device has this layer in use/ };
    await assert.rejects(native.attachDevice({ ...options, name: `${options.name}-b` }), refusal);
    const attempt = 'await native.attachDevice(options).catch((error) => console.log(error.code));';
    assert.equal(await outcomeOf(attempt), 'failed-precondition 0');
    const reader = await native.attachDevice({ ...options, configPath: lowerOnly(), readOnly: true });
    await reader.stop(false);
    await device.stop(false);
    const next = await native.attachDevice(options);
    await next.stop(false);
  });

  const script = (body: string): string =>
    `import { createRequire } from 'node:module';
     const native = createRequire(${JSON.stringify(fileURLToPath(import.meta.url))})(${JSON.stringify(nativePath())});
     const options = ${JSON.stringify(options)};
     ${body}`;
  const outcomeOf = async (body: string, flags: readonly string[] = []): Promise<string> => {
    const child = spawn(process.execPath, [...flags, '--input-type=module', '-e', script(body)], {
      stdio: ['ignore', 'pipe', 'ignore'],
    });
    let text = '';
    child.stdout.on('data', (part: Buffer) => {
      text += part.toString();
    });
    const [code, signal] = (await once(child, 'close')) as [number | null, string | null];
    return `${text.trim()} ${signal ?? code}`.trim();
  };

  it('lets a process end with a device attached; its node fails instead of hanging and can be released', async () => {
    for (const end of ['process.exit(3);', 'process.kill(process.pid, "SIGKILL");']) {
      const outcome = await outcomeOf(`console.log((await native.attachDevice(options)).path); ${end}`);
      assert.match(outcome, /^\/dev\/loop\d+ (3|SIGKILL)$/);
      const path = outcome.split(' ')[0] ?? '';
      await assert.rejects(
        promisify(execFile)('dd', [`if=${path}`, 'of=/dev/null', 'bs=4096', 'count=1']),
        /Input\/output/,
      );
      assert.deepEqual(await native.releaseStaleDevices(options.name), [path]);
    }
  });

  it('lets a process end in the middle of an attach, a flush and a stop', async () => {
    for (const body of [
      'const device = await native.attachDevice(options); device.flush(); device.stop(false); process.exit(4);',
      'const device = await native.attachDevice(options); device.stop(false); process.exit(4);',
      'native.inspectLayer("/dev/null").catch(() => {}); native.mountTable("self"); process.exit(4);',
    ]) {
      assert.equal(await outcomeOf(body), '4', body);
    }
    assert.equal(await outcomeOf('native.attachDevice(options); process.exit(4);'), '4');
    await native.releaseStaleDevices(options.name); // whether it came so far is a matter of luck
  });

  it('lets an uncaught error end a process with a device attached', async () => {
    const body = 'await native.attachDevice(options); throw new Error("bug");';
    assert.equal(await outcomeOf(body), '1');
    await native.releaseStaleDevices(options.name);
  });

  it('stops the device of a handle that was dropped', async () => {
    const body = `
      await (async () => { await native.attachDevice(options); })();
      for (let i = 0; i < 500; i++) {
        globalThis.gc();
        await new Promise((resolve) => setTimeout(resolve, 10));
        const again = await native.attachDevice(options).catch(() => null);
        if (again) { await again.stop(false); console.log('dropped'); process.exit(0); }
      }`;
    assert.equal(await outcomeOf(body, ['--expose-gc']), 'dropped 0');
  });

  it('works in a worker whose end stops its devices', async () => {
    const worker = script('await native.attachDevice(options); parentPort.postMessage("attached");').replace(
      'import { createRequire }',
      "import { parentPort } from 'node:worker_threads'; import { createRequire }",
    );
    const body = `
      import { Worker } from 'node:worker_threads';
      const worker = new Worker(new URL('data:text/javascript,' + encodeURIComponent(${JSON.stringify(worker)})));
      await new Promise((resolve, reject) => { worker.on('message', resolve); worker.on('error', reject); });
      await worker.terminate();
      const again = await native.attachDevice(options);
      await again.stop(false);
      console.log('again');`;
    assert.equal(await outcomeOf(body), 'again 0');
  });
});
