/** The image of the demo: redis-server out of Debian packages, in three layers.
 *
 *   1 base    busybox with its applets, accounts, the C and C++ libraries
 *   2 redis   the server, its tools and the libraries only they need
 *   3 config  our configuration: /etc/redis is opaque (Debian's own file is hidden), redis-benchmark is whited out */
import { mkdirSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { makeBase } from './busybox.ts';
import { downloadWithLibraries, missingLibraries, type Package, unpack } from './debian.ts';
import { type CachedImage, cached, recipeKey, writeImage } from './oci.ts';

const baseNames = ['libc6', 'libgcc-s1', 'libstdc++6', 'libcrypt1'];

/** Where the server listens, in a directory that the caller mounts from outside. */
export const redisSocket = '/run/redis/redis.sock';
export const redisCommand = ['/usr/bin/redis-server', '/etc/redis/redis.conf'] as const;

const configuration = `# No network: clients come through the socket.
port 0
unixsocket ${redisSocket}
unixsocketperm 700
dir /var/lib/redis
# Every answered write is on the disk.
appendonly yes
appendfsync always
save ""
daemonize no
logfile ""
`;

export function redisImage(): Promise<CachedImage> {
  const sources = ['oci.ts', 'debian.ts', 'redis.ts', 'busybox.ts'].map((file) => path.join(import.meta.dirname, file));
  return cached(recipeKey('redis', sources), async (layout, scratch) => {
    const packages = await downloadWithLibraries(['redis-server', 'redis-tools', ...baseNames]);
    const base = path.join(scratch, 'base');
    const redis = path.join(scratch, 'redis');
    const config = path.join(scratch, 'config');
    const isBase = ({ name }: Package): boolean => baseNames.includes(name);
    for (const deb of packages) await unpack(deb, isBase(deb) ? base : redis);
    await makeBase(base);
    writePackageList(path.join(base, 'etc/packages'), packages.filter(isBase));
    writePackageList(
      path.join(redis, 'etc/redis/packages'),
      packages.filter((deb) => !isBase(deb)),
    );
    makeConfig(config);
    const missing = await missingLibraries([base, redis]);
    if (missing.length > 0) throw new Error(`redis image lacks ${missing.join(', ')}`);
    await writeImage(layout, { layers: [{ tree: base }, { tree: redis }, { tree: config }], cmd: redisCommand });
  });
}

function makeConfig(root: string): void {
  mkdirSync(path.join(root, 'etc/redis'), { recursive: true });
  writeFileSync(path.join(root, 'etc/redis/.wh..wh..opq'), '');
  writeFileSync(path.join(root, 'etc/redis/redis.conf'), configuration);
  mkdirSync(path.join(root, 'usr/bin'), { recursive: true });
  writeFileSync(path.join(root, 'usr/bin/.wh.redis-benchmark'), '');
  mkdirSync(path.join(root, 'run/redis'), { recursive: true });
  mkdirSync(path.join(root, 'var/lib/redis'), { recursive: true });
}

function writePackageList(file: string, packages: readonly Package[]): void {
  mkdirSync(path.dirname(file), { recursive: true });
  writeFileSync(
    file,
    packages
      .map(({ name, version }) => `${name} ${version}\n`)
      .sort()
      .join(''),
  );
}
