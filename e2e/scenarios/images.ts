/** Small OCI images made from nothing but Debian's static busybox, pushed with plain HTTP as a registry defines it. */
import { createHash } from 'node:crypto';
import { copyFileSync, mkdirSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import { run } from '../harness/processes.ts';
import type { Workdir } from '../harness/workdir.ts';

export interface Layer {
  readonly blob: Uint8Array;
  readonly digest: string;
  /** Digest of the uncompressed tar. */
  readonly diffId: string;
  readonly mediaType: string;
}

export interface Image {
  readonly layers: readonly Layer[];
  readonly config: Uint8Array;
  readonly manifest: Uint8Array;
}

export const digestOf = (bytes: Uint8Array): string => `sha256:${createHash('sha256').update(bytes).digest('hex')}`;

/** A layer of a directory's content, owned by root, in a fixed order. */
export async function layerOf(work: Workdir, dir: string, compression: 'gzip' | 'none' = 'gzip'): Promise<Layer> {
  const tarPath = path.join(work.dir('layers'), `${path.basename(dir)}.tar`);
  const args = ['--create', '--file', tarPath, '--owner=0', '--group=0', '--numeric-owner', '--sort=name', '-C', dir];
  await run('tar', [...args, ...readdirSync(dir)]);
  return layerOfTar(readFileSync(tarPath), compression);
}

export function layerOfTar(tar: Uint8Array, compression: 'gzip' | 'none' = 'gzip'): Layer {
  const blob = compression === 'gzip' ? gzipSync(tar) : tar;
  return {
    blob,
    digest: digestOf(blob),
    diffId: digestOf(tar),
    mediaType: `application/vnd.oci.image.layer.v1.tar${compression === 'gzip' ? '+gzip' : ''}`,
  };
}

export function imageOf(layers: readonly Layer[], command: readonly string[] = ['/bin/sh']): Image {
  const encode = (value: object): Uint8Array => Buffer.from(JSON.stringify(value));
  const config = encode({
    architecture: process.arch === 'arm64' ? 'arm64' : 'amd64',
    os: 'linux',
    config: { Cmd: command, Env: ['PATH=/bin'] },
    rootfs: { type: 'layers', diff_ids: layers.map((layer) => layer.diffId) },
  });
  const manifest = encode({
    schemaVersion: 2,
    mediaType: 'application/vnd.oci.image.manifest.v1+json',
    config: { mediaType: 'application/vnd.oci.image.config.v1+json', digest: digestOf(config), size: config.length },
    layers: layers.map(({ mediaType, digest, blob }) => ({ mediaType, digest, size: blob.length })),
  });
  return { layers, config, manifest };
}

/** Returns the reference, host/repository:tag. */
export async function push(host: string, repository: string, tag: string, image: Image): Promise<string> {
  for (const blob of [...image.layers.map((layer) => layer.blob), image.config]) {
    const begun = await expectStatus(202, fetch(`http://${host}/v2/${repository}/blobs/uploads/`, { method: 'POST' }));
    const location = new URL(begun.headers.get('location') ?? '', `http://${host}`);
    location.searchParams.set('digest', digestOf(blob));
    await expectStatus(201, fetch(location, { method: 'PUT', body: new Uint8Array(blob) }));
  }
  await expectStatus(
    201,
    fetch(`http://${host}/v2/${repository}/manifests/${tag}`, {
      method: 'PUT',
      headers: { 'content-type': 'application/vnd.oci.image.manifest.v1+json' },
      body: new Uint8Array(image.manifest),
    }),
  );
  return `${host}/${repository}:${tag}`;
}

async function expectStatus(status: number, answer: Promise<Response>): Promise<Response> {
  const response = await answer;
  if (response.status !== status) throw new Error(`${response.url}: HTTP ${response.status}: ${await response.text()}`);
  return response;
}

/** A root file system with busybox as every command the scenarios use, and /hello. */
export function busyboxTree(work: Workdir, name = 'busybox'): string {
  const tree = work.dir('trees', name);
  for (const dir of ['bin', 'proc', 'sys', 'dev', 'tmp', 'etc', 'data'])
    mkdirSync(path.join(tree, dir), { recursive: true });
  copyFileSync('/bin/busybox', path.join(tree, 'bin/busybox'));
  for (const applet of [
    'sh',
    'cat',
    'ls',
    'sleep',
    'sync',
    'mkdir',
    'rm',
    'dd',
    'md5sum',
    'grep',
    'mount',
    'df',
    'touch',
    'true',
    'echo',
    'find',
  ]) {
    symlinkSync('busybox', path.join(tree, 'bin', applet));
  }
  writeFileSync(path.join(tree, 'hello'), 'hello from a lower layer\n');
  writeFileSync(path.join(tree, 'etc/removed-later'), 'the second layer removes this\n');
  return tree;
}

/** Two layers: busybox, and one that adds a file, replaces one, and removes one by an OCI whiteout. */
export async function busyboxImage(work: Workdir): Promise<Image> {
  const upper = work.dir('trees', 'upper');
  mkdirSync(path.join(upper, 'etc'), { recursive: true });
  writeFileSync(path.join(upper, 'etc/added'), 'added by the second layer\n');
  writeFileSync(path.join(upper, 'hello'), 'hello\n');
  writeFileSync(path.join(upper, 'etc/.wh.removed-later'), '');
  return imageOf([await layerOf(work, busyboxTree(work)), await layerOf(work, upper)]);
}
