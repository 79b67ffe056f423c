/** OCI images made of directories, without a container engine: deterministic layer tars, an OCI layout, a push.
 *
 * The same trees give the same digests on every machine: entries sorted, one time stamp, numeric owners, gzip without
 * a date. */
import { createHash } from 'node:crypto';
import { mkdirSync, readdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { promisify } from 'node:util';
import { gzip } from 'node:zlib';
import { run } from '../harness/processes.ts';
import { repository } from '../harness/workdir.ts';

/** Where images and downloads are kept between runs. */
export const cacheDir = path.join(repository, 'build/images');

/** Time of every file in every layer: 2024-01-01. */
const fileTime = '@1704067200';

export const MediaType = {
  Index: 'application/vnd.oci.image.index.v1+json',
  Manifest: 'application/vnd.oci.image.manifest.v1+json',
  Config: 'application/vnd.oci.image.config.v1+json',
  LayerTar: 'application/vnd.oci.image.layer.v1.tar',
  LayerTarGzip: 'application/vnd.oci.image.layer.v1.tar+gzip',
} as const;

/** A layer is a directory tree (packed and compressed by us; whiteouts are files named `.wh.…`), or a tar stored as
 * it is, with annotations that become snapshot labels when they have the prefix. */
export type LayerSource =
  | { readonly tree: string }
  | { readonly tar: string; readonly annotations?: Readonly<Record<string, string>> };

export interface ImageSpec {
  /** Bottom first. */
  readonly layers: readonly LayerSource[];
  readonly cmd: readonly string[];
  readonly env?: readonly string[];
  readonly workingDir?: string;
}

export interface Descriptor {
  readonly mediaType: string;
  readonly digest: string;
  readonly size: number;
  readonly annotations?: Readonly<Record<string, string>>;
}

export interface Manifest {
  readonly config: Descriptor;
  readonly layers: readonly Descriptor[];
}

/** An image in an OCI layout on disk, under the tag "latest". */
export interface Image {
  readonly layout: string;
}

export interface CachedImage extends Image {
  /** False when an earlier run had built it. */
  readonly isNew: boolean;
}

/** A name made of the sources an image is built from; a change of any gives another. */
export function recipeKey(name: string, sources: readonly string[]): string {
  const hash = createHash('sha256');
  for (const source of sources) hash.update(readFileSync(source)).update('\0');
  return `${name}-${process.arch}-${hash.digest('hex').slice(0, 16)}`;
}

/** The image of that key from the cache, or built into it. Complete or absent, never half made. */
export async function cached(
  key: string,
  build: (layout: string, scratch: string) => Promise<void>,
): Promise<CachedImage> {
  const final = path.join(cacheDir, key);
  const isNew = statSync(final, { throwIfNoEntry: false }) === undefined;
  if (isNew) {
    const scratch = path.join(cacheDir, `.${key}.${process.pid}`);
    rmSync(scratch, { recursive: true, force: true });
    mkdirSync(scratch, { recursive: true });
    try {
      const layout = path.join(scratch, 'layout');
      await build(layout, scratch);
      try {
        renameSync(layout, final);
      } catch (error) {
        // Another run was faster with the same content.
        if (statSync(final, { throwIfNoEntry: false }) === undefined) throw error;
      }
    } finally {
      rmSync(scratch, { recursive: true, force: true });
    }
  }
  return { layout: final, isNew };
}

/** Writes the image as an OCI layout into a new directory. */
export async function writeImage(layout: string, spec: ImageSpec): Promise<void> {
  mkdirSync(path.join(layout, 'blobs/sha256'), { recursive: true });
  const layers: Descriptor[] = [];
  const diffIds: string[] = [];
  for (const source of spec.layers) {
    if ('tree' in source) {
      const tar = await packTree(source.tree, path.join(layout, '.layer.tar'));
      diffIds.push(digestOf(tar));
      layers.push(putBlob(layout, MediaType.LayerTarGzip, await promisify(gzip)(tar)));
    } else {
      const tar = readFileSync(source.tar);
      diffIds.push(digestOf(tar));
      layers.push({
        ...putBlob(layout, MediaType.LayerTar, tar),
        ...(source.annotations === undefined ? {} : { annotations: source.annotations }),
      });
    }
  }
  const config = putJson(layout, MediaType.Config, {
    created: '2024-01-01T00:00:00Z',
    architecture: process.arch === 'x64' ? 'amd64' : process.arch,
    os: 'linux',
    config: {
      Env: spec.env ?? ['PATH=/usr/sbin:/usr/bin:/sbin:/bin'],
      Cmd: spec.cmd,
      WorkingDir: spec.workingDir ?? '/',
    },
    rootfs: { type: 'layers', diff_ids: diffIds },
    history: layers.map((_, index) => ({ created: '2024-01-01T00:00:00Z', created_by: `layer ${index + 1}` })),
  });
  const manifest = putJson(layout, MediaType.Manifest, {
    schemaVersion: 2,
    mediaType: MediaType.Manifest,
    config,
    layers,
  });
  writeFileSync(
    path.join(layout, 'index.json'),
    JSON.stringify({
      schemaVersion: 2,
      mediaType: MediaType.Index,
      manifests: [{ ...manifest, annotations: { 'org.opencontainers.image.ref.name': 'latest' } }],
    }),
  );
  writeFileSync(path.join(layout, 'oci-layout'), JSON.stringify({ imageLayoutVersion: '1.0.0' }));
}

/** Pushes to a registry on loopback and returns the reference, e.g. 127.0.0.1:5000/t/redis:latest. */
export async function pushImage(image: Image, host: string, repositoryName: string, tag = 'latest'): Promise<string> {
  const reference = `${host}/${repositoryName}:${tag}`;
  await run('skopeo', [
    '--insecure-policy',
    'copy',
    '--quiet',
    // Else skopeo compresses plain tars and drops the annotations of layers.
    '--preserve-digests',
    '--dest-tls-verify=false',
    `oci:${image.layout}:latest`,
    `docker://${reference}`,
  ]);
  return reference;
}

export function readManifest(image: Image): Manifest {
  const index = JSON.parse(readFileSync(path.join(image.layout, 'index.json'), 'utf8')) as {
    readonly manifests: readonly Descriptor[];
  };
  const [descriptor] = index.manifests;
  if (descriptor === undefined) throw new Error(`${image.layout}: the index is empty`);
  return JSON.parse(readFileSync(blobPath(image.layout, descriptor.digest), 'utf8')) as Manifest;
}

/** Digests of the uncompressed layers, bottom first. */
export function diffIds(image: Image): readonly string[] {
  const text = readFileSync(blobPath(image.layout, readManifest(image).config.digest), 'utf8');
  return (JSON.parse(text) as { readonly rootfs: { readonly diff_ids: readonly string[] } }).rootfs.diff_ids;
}

/** The names containerd gives to the committed snapshots of the layers, bottom first. */
export function chainIds(image: Image): readonly string[] {
  const chain: string[] = [];
  for (const diffId of diffIds(image)) {
    const below = chain.at(-1);
    chain.push(below === undefined ? diffId : digestOf(Buffer.from(`${below} ${diffId}`)));
  }
  return chain;
}

/** Packs a directory deterministically; the file is removed again. */
async function packTree(tree: string, file: string): Promise<Buffer> {
  const args = ['--create', '--file', file, '--directory', tree, '--sort=name', `--mtime=${fileTime}`];
  // By default extended headers hold the process id and other times.
  const headers = ['--format=posix', '--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime'];
  await run('tar', [...args, ...headers, '--numeric-owner', '--xattrs', ...topEntries(tree)]);
  const bytes = readFileSync(file);
  rmSync(file);
  return bytes;
}

/** Named one by one: an entry for "." would carry the mode of a scratch directory. */
function topEntries(tree: string): readonly string[] {
  return readdirSync(tree).sort();
}

function digestOf(bytes: Uint8Array): string {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
}

function blobPath(layout: string, digest: string): string {
  return path.join(layout, 'blobs', digest.replace(':', '/'));
}

function putBlob(layout: string, mediaType: string, bytes: Uint8Array): Descriptor {
  const digest = digestOf(bytes);
  writeFileSync(blobPath(layout, digest), bytes);
  return { mediaType, digest, size: bytes.length };
}

function putJson(layout: string, mediaType: string, value: unknown): Descriptor {
  return putBlob(layout, mediaType, Buffer.from(JSON.stringify(value)));
}
