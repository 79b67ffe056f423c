/** A real registry on loopback, storing below the work directory. */
import { writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import path from 'node:path';
import { Daemon } from './processes.ts';
import type { Workdir } from './workdir.ts';

export interface Registry {
  /** 127.0.0.1:PORT, the first part of an image reference. */
  readonly host: string;
  readonly daemon: Daemon;
}

/** A loopback port that nobody listened on a moment ago. */
export async function freePort(): Promise<number> {
  const server = createServer();
  const { promise, resolve, reject } = Promise.withResolvers<number>();
  server.once('error', reject);
  server.listen(0, '127.0.0.1', () => {
    const address = server.address();
    resolve(typeof address === 'object' && address !== null ? address.port : 0);
  });
  const port = await promise;
  await new Promise((closed) => server.close(closed));
  return port;
}

export async function startRegistry(work: Workdir): Promise<Registry> {
  const host = `127.0.0.1:${await freePort()}`;
  const configPath = path.join(work.dir('registry'), 'config.yml');
  writeFileSync(
    configPath,
    `version: 0.1
log: { level: info, formatter: json }
storage:
  filesystem: { rootdirectory: ${JSON.stringify(work.dir('registry', 'data'))} }
  delete: { enabled: true }
http: { addr: ${JSON.stringify(host)}, secret: loopback }
`,
  );
  const daemon = await Daemon.start(work, {
    name: 'registry',
    program: 'docker-registry',
    args: ['serve', configPath],
    // It has no state to save and waits for idle connections.
    stopSignal: 'SIGKILL',
  });
  await daemon.ready('answers', async () => (await fetch(`http://${host}/v2/`)).ok);
  return { host, daemon };
}
