// Invariants: the address is never missing between two servers; only a socket that nobody answers is replaced; nobody but
// the owner may connect; what is not ours is not removed.
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { chmodSync, existsSync, lstatSync, mkdtempSync, readdirSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { connect, createServer, type Server } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, it } from 'node:test';
import { ErrorKind } from '../base/errors.ts';
import { claimSocketPlace, type SocketPlace } from './unix-socket.ts';

describe('unix socket place', () => {
  let directory: string;
  let address: string;
  const servers: Server[] = [];
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'sock-'));
    address = join(directory, 'run', 'x.sock');
  });
  afterEach(() => {
    for (const server of servers.splice(0)) server.close();
    rmSync(directory, { recursive: true });
  });

  async function serve(place: SocketPlace): Promise<Server> {
    const server = createServer((socket) => socket.end());
    servers.push(server);
    server.listen(place.bindPath);
    await once(server, 'listening');
    await place.publish();
    return server;
  }

  it('appears with mode 0600 in a directory of mode 0700 and leaves nothing else there', async () => {
    const place = await claimSocketPlace(address);
    assert.ok(!existsSync(address));
    await serve(place);
    assert.equal(lstatSync(address).mode & 0o777, 0o600);
    assert.equal(lstatSync(join(directory, 'run')).mode & 0o777, 0o700);
    assert.deepEqual(readdirSync(join(directory, 'run')), ['x.sock']);
    await once(connect(address), 'connect');
    await place.withdraw();
    await place.withdraw();
    assert.deepEqual(readdirSync(join(directory, 'run')), []);
  });

  it('replaces a socket that nobody answers', async () => {
    const dead = await serve(await claimSocketPlace(address));
    dead.close();
    assert.ok(lstatSync(address).isSocket());
    await serve(await claimSocketPlace(address));
    await once(connect(address), 'connect');
  });

  it('refuses a socket that somebody answers', async () => {
    await serve(await claimSocketPlace(address));
    await assert.rejects(claimSocketPlace(address), { kind: ErrorKind.FailedPrecondition, message: /answers/ });
    await once(connect(address), 'connect');
  });

  it('leaves what is no socket alone', async () => {
    const file = join(directory, 'file');
    writeFileSync(file, 'precious');
    await assert.rejects(claimSocketPlace(file), { kind: ErrorKind.FailedPrecondition, message: /no socket/ });
    assert.equal(lstatSync(file).size, 8);
  });

  it('withdraws only its own', async () => {
    const place = await claimSocketPlace(address);
    await serve(place);
    renameSync(address, `${address}.kept`);
    const other = await claimSocketPlace(address);
    await serve(other);
    await place.withdraw();
    assert.ok(existsSync(address));
    chmodSync(address, 0o600);
  });

  it('refuses a path that no socket can have, and cleans up', async () => {
    const long = join(directory, 'run', 'l'.repeat(120));
    await assert.rejects(claimSocketPlace(long), { kind: ErrorKind.InvalidArgument, message: /too long/ });
    assert.deepEqual(readdirSync(join(directory, 'run')), []);
  });
});
