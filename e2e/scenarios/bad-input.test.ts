/** Malformed configurations and layers: the reason is said by name, nothing else suffers, nothing is left. */
import assert from 'node:assert/strict';
import { copyFileSync, existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { describe, it } from 'node:test';
import { status } from '@grpc/grpc-js';
import { runAny } from '../harness/processes.ts';
import { binDir } from '../harness/snapshotter.ts';
import { repository, Workdir } from '../harness/workdir.ts';
import { refused, Stand, told, writableLabel } from './stand.ts';

const fixtures = path.join(repository, 'native/testdata/fixtures');

describe('a malformed configuration of the snapshotter', () => {
  const start = async (text: string | null): Promise<{ code: number; said: string }> => {
    await using work = new Workdir('bad-config');
    const file = path.join(work.path, 'config.json');
    if (text !== null) writeFileSync(file, text.replaceAll('$', work.path));
    const { code, stdout, stderr } = await runAny(path.join(binDir, 'overlaybd-snapshotter'), ['--config', file], {
      timeoutMs: 30_000,
    });
    return { code, said: stdout + stderr };
  };

  it(
    'a missing file ends the start with status 1 and its name',
    told(async () => {
      const { code, said } = await start(null);
      assert.equal(code, 1);
      assert.match(said, /config\.json/);
    }),
  );

  it(
    'text that is no JSON ends the start with status 1 and the place',
    told(async () => {
      const { code, said } = await start('{"root": "$/root", "address": }');
      assert.equal(code, 1);
      assert.match(said, /config\.json/);
    }),
  );

  it(
    'every problem is reported at once, by key path',
    told(async () => {
      const { code, said } = await start(
        '{"root": 7, "address": "", "overlaybdWorker": {"ociLayers": "directory", "nonsense": 1}}',
      );
      assert.equal(code, 1);
      for (const key of ['root', 'address', 'overlaybdWorker.ociLayers', 'nonsense']) {
        assert.ok(said.includes(key), `${key} is named in: ${said}`);
      }
    }),
  );
});

describe('a malformed layer', () => {
  /** Unpacks a file as a client's label-less unpack would: into the directory Prepare returned. */
  const unpack = async (stand: Stand, name: string, parent: string, file: string): Promise<void> => {
    const [mount] = await stand.client.prepare(`extract-1 ${name}`, parent);
    const upper = mount?.options.find((option) => option.startsWith('upperdir='))?.slice('upperdir='.length);
    copyFileSync(file, path.join(upper ?? mount?.source ?? '', 'overlaybd.commit'));
    await stand.client.commit(name, `extract-1 ${name}`);
  };

  /** Those that can't even be opened, after the manifest of the fixtures. */
  const negatives = (
    JSON.parse(readFileSync(path.join(fixtures, 'manifest.json'), 'utf8')) as {
      readonly cases: readonly { readonly id: string; readonly expected: { readonly open?: string } }[];
    }
  ).cases
    .filter(({ id, expected }) => expected.open === 'error' && existsSync(path.join(fixtures, id, 'layer')))
    .map(({ id }) => id);
  assert.ok(negatives.length >= 5);

  it(
    `each of ${negatives.length} is refused by name when a container wants it, and others go on`,
    told(async () => {
      await using stand = await Stand.start('bad-layer');
      const { client } = stand;
      await unpack(stand, 'good', '', path.join(fixtures, 'ext4-apply-2/layer00'));
      for (const name of negatives) {
        // What is seen to be damaged is refused by Commit; what only shows when it is opened, by the one who wants it.
        const key = `container of ${name}`;
        const [verb, outcome] = await unpack(stand, name, '', path.join(fixtures, name, 'layer'))
          .then(() => client.prepare(key, name, { [writableLabel]: 'dev' }))
          .then(
            () => ['', null] as const,
            async (error: { code: status; details: string }) =>
              [
                (await client.list(`name==${JSON.stringify(name)}`)).length === 0 ? 'commit' : 'prepare',
                error,
              ] as const,
          );
        assert.ok(outcome !== null, `${name} gave a device`);
        // A file that is no layer at all makes an ordinary directory, which can't give a device.
        const typed = [status.DATA_LOSS, status.INVALID_ARGUMENT, status.FAILED_PRECONDITION, status.UNIMPLEMENTED];
        assert.ok(typed.includes(outcome.code), `${name}: ${status[outcome.code]} ${outcome.details}`);
        assert.ok(outcome.details.includes(name), outcome.details);
        await refused(client.stat(key), status.NOT_FOUND);
        await client.remove(verb === 'commit' ? `extract-1 ${name}` : name);
        assert.equal((await client.prepare(`good beside ${name}`, 'good', { [writableLabel]: 'dev' })).length, 1);
        await client.remove(`good beside ${name}`);
      }
    }),
  );

  it(
    'a stack with a hole is refused by name; once the layer is back the same call works',
    told(async () => {
      await using stand = await Stand.start('missing-layer');
      const { client } = stand;
      await unpack(stand, 'bottom', '', path.join(fixtures, 'ext4-apply-2/layer00'));
      await unpack(stand, 'top', 'bottom', path.join(fixtures, 'ext4-apply-2/layer01'));
      const [bottom = ''] = readdirSync(path.join(stand.snapshotter.root, 'snapshots')).sort(
        (a, b) => Number(a) - Number(b),
      );
      const file = path.join(stand.snapshotter.snapshotDir(bottom), 'fs/overlaybd.commit');
      const kept = readFileSync(file);
      writeFileSync(file, kept.subarray(0, kept.length / 2));
      const said = await refused(
        client.prepare('container', 'top', { [writableLabel]: 'dev' }),
        status.DATA_LOSS,
        /container/,
      );
      assert.match(said, /layer|overlaybd\.commit/);
      await refused(client.stat('container'), status.NOT_FOUND);
      writeFileSync(file, kept);
      assert.equal((await client.prepare('container', 'top', { [writableLabel]: 'dev' })).length, 1);
    }),
  );

  it(
    'a broken config.v1.json is told from a missing one',
    told(async () => {
      await using stand = await Stand.start('bad-image-config');
      const { client } = stand;
      await unpack(stand, 'layer', '', path.join(fixtures, 'ext4-apply-2/layer00'));
      // It is written behind the Commit; Stat waits for that.
      await client.stat('layer');
      const [id = ''] = readdirSync(path.join(stand.snapshotter.root, 'snapshots'));
      const config = path.join(stand.snapshotter.snapshotDir(id), 'block/config.v1.json');
      const kept = readFileSync(config);
      for (const text of ['', '{', '[]', '{"lowers": 7}', '{"lowers": [{"file": {}}]}', '\0'.repeat(100)]) {
        mkdirSync(path.dirname(config), { recursive: true });
        writeFileSync(config, text);
        const outcome = await client.prepare('container', 'layer', { [writableLabel]: 'dev' }).then(
          () => null,
          (error: { code: status; details: string }) => error,
        );
        // Either it is made anew from what the store knows, or refused with a reason; never taken for something else.
        if (outcome === null) await client.remove('container');
        else {
          assert.ok(
            [status.DATA_LOSS, status.INVALID_ARGUMENT, status.FAILED_PRECONDITION].includes(outcome.code),
            outcome.details,
          );
          assert.match(outcome.details, /container/);
        }
      }
      writeFileSync(config, kept);
      assert.equal((await client.prepare('container', 'layer', { [writableLabel]: 'dev' })).length, 1);
    }),
  );
});
