// Invariants: the original's file works as it is; every key has a default; all problems come at once, each with its key;
// nothing can be changed after loading; docs/config.md is what the schema says.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { describe, it } from 'node:test';
import fc from 'fast-check';
import { type Config, ConfigError, loadConfig, parseConfig, storesOf } from './config.ts';
import { renderConfigDoc } from './config-doc.ts';

const least = { root: '/r', address: '/run/a.sock' };
const load = (value: object): Config => parseConfig(JSON.stringify(value), 'test').config;
const warningsOf = (value: object): readonly string[] => parseConfig(JSON.stringify(value), 'test').warnings;

function problemsOf(value: object | string): readonly string[] {
  try {
    parseConfig(typeof value === 'string' ? value : JSON.stringify(value), 'test');
  } catch (error) {
    assert.ok(error instanceof ConfigError, String(error));
    return error.problems;
  }
  return [];
}

describe('configuration', () => {
  it('reads the seed: four keys, comments, a trailing comma', () => {
    const { config, warnings } = parseConfig(
      `\ufeff{
        // where it lives
        "root": "/var/lib/overlaybd", /* and
        how it is reached */
        "address": "  /run/overlaybd.sock ",
        "rwMode": "dev", // "dir"
        "writableLayerType": "sparse",
      }`,
      'test',
    );
    assert.deepEqual(warnings, []);
    assert.deepEqual(
      [config.root, config.address, config.rwMode, config.writableLayerType],
      ['/var/lib/overlaybd', '/run/overlaybd.sock', 'dev', 'sparse'],
    );
  });

  it('reads the sample that is shipped', async () => {
    const sample = new URL('../../deploy/config.json', import.meta.url).pathname;
    assert.deepEqual((await loadConfig(sample)).warnings, []);
  });

  it("has the original's defaults", () => {
    const { overlaybdWorker: _, ...upstream } = load(least);
    assert.deepEqual(upstream, {
      ...least,
      verbose: 'info',
      logLevel: 'info',
      logReportCaller: false,
      rwMode: 'overlayfs',
      autoRemoveDev: false,
      asyncRemove: false,
      writableLayerType: 'append',
      defaultFsType: 'ext4',
      turboFsType: ['erofs', 'ext4'],
      mirrorRegistry: [],
      rootfsQuota: '',
      tenant: -1,
      runtimeType: 'containerd',
      exporterConfig: { enable: false, uriPrefix: '/metrics', port: 9863 },
    });
  });

  it('has defaults of our own', () => {
    const { overlaybdWorker } = load({ ...least, overlaybdWorker: { blockd: { threads: 2 } } });
    assert.equal(overlaybdWorker.ociLayers, 'overlayfs');
    assert.equal(overlaybdWorker.sectorSizeBytes, 4096);
    assert.equal(overlaybdWorker.blockd.threads, 2);
    assert.equal(overlaybdWorker.blockd.spawn, true);
    assert.equal(overlaybdWorker.metrics.host, '127.0.0.1');
  });

  it('reads keys in any letter case, null as not given, and merges the exporter key by key', () => {
    const config = load({
      ROOT: '/r',
      Address: '/a',
      RWMODE: 'dir',
      autoRemovedev: true,
      mirrorRegistry: null,
      ExporterConfig: { PORT: 1234 },
    });
    assert.deepEqual(
      [config.root, config.rwMode, config.autoRemoveDev, config.mirrorRegistry],
      ['/r', 'dir', true, []],
    );
    assert.deepEqual(config.exporterConfig, { enable: false, uriPrefix: '/metrics', port: 1234 });
    assert.deepEqual(load({ ...least, mirrorRegistry: [{ Host: 'h', INSECURE: true }] }).mirrorRegistry, [
      { host: 'h', insecure: true },
    ]);
  });

  it('tolerates what the original tolerates, and says so', () => {
    const given = { ...least, rwmode: 'nonsense', verbose: 'loud', writableLayerType: 'x', future: 1, Exporter: {} };
    assert.deepEqual(warningsOf(given), [
      'future: unknown key, ignored',
      'Exporter: unknown key, ignored',
      'rwMode: "nonsense" is none of overlayfs, dir, dev; overlayfs is used',
      'writableLayerType: "x" is none of append, sparse; append is used',
      'verbose: "loud" is no log level; info is used',
    ]);
    assert.equal(load(given).rwMode, 'overlayfs');
  });

  it('maps upstream level names', () => {
    const levelOf = (verbose: string) => load({ ...least, verbose }).logLevel;
    assert.deepEqual(['trace', 'DEBUG', 'info', 'warning', 'warn', 'error', 'fatal', 'panic'].map(levelOf), [
      'trace',
      'debug',
      'info',
      'warn',
      'warn',
      'error',
      'fatal',
      'fatal',
    ]);
    assert.equal(load({ ...least, verbose: 'info', overlaybdWorker: { logLevel: 'trace' } }).logLevel, 'trace');
  });

  it('reports all problems at once, by key path', () => {
    assert.deepEqual(
      problemsOf({
        adress: '/run/a.sock',
        tenant: 'x',
        defaultFsType: '../ext4',
        exporterConfig: { port: 65536 },
        overlaybdWorker: {
          ociLayer: 'block',
          blockdAddress: '/x',
          rwMode: 'dir',
          zzzzzzzzzzzzzz: 1,
          blockd: { attachTimeout: 1 },
          sectorSizeBytes: 1024,
        },
      }),
      [
        'root: must be set',
        'address: must be set',
        'defaultFsType: file system "../ext4": the first part must name a file system',
        'tenant: expected number, received string',
        'exporterConfig.port: Too big: expected number to be <=65535',
        'overlaybdWorker.blockd.attachTimeout: unknown key; did you mean overlaybdWorker.blockd.attachTimeoutMs?',
        'overlaybdWorker.sectorSizeBytes: Invalid option: expected one of 512|4096',
        'overlaybdWorker.ociLayer: unknown key; did you mean overlaybdWorker.ociLayers?',
        'overlaybdWorker.blockdAddress: unknown key; did you mean overlaybdWorker.blockd.address?',
        'overlaybdWorker.rwMode: unknown key; did you mean rwMode (outside overlaybdWorker)?',
        'overlaybdWorker.zzzzzzzzzzzzzz: unknown key',
        'adress: unknown key, ignored; did you mean address?',
      ],
    );
  });

  it('says where text stops being JSON', () => {
    assert.match(problemsOf('{\n  /* c\n */ root: 1\n}')[0] ?? '', /is not JSON: .*line 3/);
    assert.match(problemsOf('[]')[0] ?? '', /must hold a JSON object/);
    assert.match(problemsOf('')[0] ?? '', /is not JSON/);
  });

  it('names a file that is not there', async () => {
    await assert.rejects(loadConfig('/nonexistent/config.json'), /\/nonexistent\/config.json: a problem\n.*ENOENT/);
  });

  it('gives each owner a store, and lets no two meet', () => {
    const store = (name: string, address: string, root: string) => ({ name, address, root });
    const withStores = (...stores: object[]) => ({ ...least, overlaybdWorker: { stores } });
    assert.deepEqual(storesOf(load(withStores(store('buildkit', '/run/b.sock', '/b')))), [
      store('default', '/run/a.sock', '/r'),
      store('buildkit', '/run/b.sock', '/b'),
    ]);
    assert.deepEqual(problemsOf(withStores(store('b', '/run/a.sock', '/r/inside'), store('b', '/c', '/'))), [
      'overlaybdWorker.stores[0].address: store default listens there',
      'overlaybdWorker.stores[0].root: must not contain, be or lie in the root of store default (/r)',
      'overlaybdWorker.stores[1].root: must not contain, be or lie in the root of store default (/r)',
      'overlaybdWorker.stores[1].name: b is taken',
      'overlaybdWorker.stores[1].root: must not contain, be or lie in the root of store b (/r/inside)',
    ]);
    assert.deepEqual(problemsOf(withStores(store('b', '/b', '/r2'))), []);
  });

  it('refuses paths no socket and no directory can have', () => {
    assert.deepEqual(problemsOf({ root: 'relative', address: `/${'a'.repeat(107)}` }), [
      'root: must be an absolute path',
      'address: is longer than 107 bytes, which no unix socket can be',
    ]);
  });

  it('is frozen to its leaves', () => {
    const config = load(least) as unknown as {
      overlaybdWorker: { blockd: { threads: number } };
      turboFsType: string[];
    };
    assert.throws(() => (config.overlaybdWorker.blockd.threads = 1), TypeError);
    assert.throws(() => config.turboFsType.push('x'), TypeError);
  });

  it('answers any JSON with a configuration or a ConfigError', () => {
    const keys = fc.constantFrom(
      'root',
      'address',
      'rwMode',
      'exporterConfig',
      'overlaybdWorker',
      'blockd',
      'stores',
      '__proto__',
    );
    const { value } = fc.letrec((tie) => ({
      value: fc.oneof(
        { depthSize: 'small' },
        fc.constantFrom(null, '/x', 1, true, 'dev'),
        fc.array(tie('value'), { maxLength: 3 }),
        fc.dictionary(keys, tie('value'), { maxKeys: 4 }),
      ),
    }));
    fc.assert(fc.property(value, (json) => void problemsOf(JSON.stringify(json))));
  });
});

describe('docs/config.md', () => {
  it('is what src/base/config-doc.ts makes of the schema', () => {
    const written = readFileSync(new URL('../../docs/config.md', import.meta.url), 'utf8');
    assert.equal(written, renderConfigDoc(), 'run: node src/base/config-doc.ts');
  });
});
