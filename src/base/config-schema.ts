/** The schema of config.json: types, defaults, limits and the words of docs/config.md, which is generated from it. */
import { isAbsolute } from 'node:path';
import { z } from 'zod';
import { parseFsDescriptor } from './fs-descriptor.ts';

/** sun_path, less what the socket's private directory adds while it is bound. */
const kSocketPathMaxBytes = 107;

const absolutePath = z
  .string()
  .trim()
  .refine((path) => isAbsolute(path), 'must be an absolute path')
  .refine((path) => !path.includes('\0'), 'contains a NUL');

const socketPath = absolutePath.refine(
  (path) => Buffer.byteLength(path) <= kSocketPathMaxBytes,
  `is longer than ${kSocketPathMaxBytes} bytes, which no unix socket can be`,
);

const fsDescriptor = z.string().superRefine((text, context) => {
  try {
    parseFsDescriptor(text);
  } catch (error) {
    context.addIssue({ code: 'custom', message: error instanceof Error ? error.message : String(error) });
  }
});

const whole = (least: number, most: number) => z.number().int().min(least).max(most);

/** Upstream's keys, with upstream's names in any letter case, defaults and meanings. Unknown ones are told about once. */
export const upstreamSchema = z.object({
  root: absolutePath.describe(
    'State directory, created with mode 0700. Symbolic links in it are resolved once at the start. For kubelet to find the image file system it should be `/var/lib/containerd/io.containerd.snapshotter.v1.overlaybd`, or be exported in the containerd configuration.',
  ),
  address: socketPath.describe('Unix socket of the snapshots service, mode 0600 in a directory of mode 0700.'),
  verbose: z
    .string()
    .default('info')
    .describe(
      'Log level: `trace`, `debug`, `info`, `warn`, `error`, `fatal` or `panic`. Another text is reported and counts as `info`.',
    ),
  logReportCaller: z
    .boolean()
    .default(false)
    .describe('Adds the place in the source to log records. Costs a stack trace each.'),
  rwMode: z
    .string()
    .default('overlayfs')
    .describe(
      'Mode of container snapshots without the label `containerd.io/snapshot/overlaybd.writable`: `overlayfs` (read-only device below an overlay), `dir` (a writable device, mounted by us) or `dev` (a writable device, mounted by the client). Another text counts as `overlayfs`. Decided once, when the snapshot is prepared.',
    ),
  autoRemoveDev: z
    .boolean()
    .default(false)
    .describe("Detaches an image's shared device when its last active child is removed, not only with the image."),
  asyncRemove: z.boolean().default(false).describe('Leaves the deletion of directories to `Cleanup`.'),
  writableLayerType: z
    .string()
    .default('append')
    .describe('Writable layers as a log (`append`) or as a sparse file (`sparse`). Another text counts as `append`.'),
  defaultFsType: fsDescriptor
    .default('ext4')
    .describe(
      'File system of new images and of layers without a label: `type[;mount options[;mkfs options]]`. A missing part means the defaults below, an empty one none.',
    ),
  turboFsType: z
    .array(z.string())
    .default(['erofs', 'ext4'])
    .describe('Order in which file system metadata of turbo layers is looked for; `ext4` and `erofs` are appended.'),
  mirrorRegistry: z
    .array(z.object({ host: z.string(), insecure: z.boolean().default(false) }))
    .default([])
    .describe('Registries; one with `insecure` is reached without TLS. In spite of the name nothing is mirrored.'),
  rootfsQuota: z
    .string()
    .default('')
    .describe(
      'Default project quota of container snapshots in overlayfs mode, such as `20g`. Read and told about, not enforced by this version.',
    ),
  tenant: whole(-1, 2 ** 31 - 1)
    .default(-1)
    .describe('Tells several snapshotters of one host apart; -1 is the default one.'),
  runtimeType: z
    .string()
    .default('containerd')
    .describe("`docker` turns on the handling of Docker's init layers, in overlayfs mode only."),
  exporterConfig: z
    .object({
      enable: z.boolean().default(false).describe('Serves Prometheus metrics over HTTP.'),
      uriPrefix: z.string().startsWith('/').default('/metrics').describe('HTTP path.'),
      port: whole(0, 65535)
        .default(9863)
        .describe('TCP port; 0 takes a free one and logs it. The address is `overlaybdWorker.metrics.host`.'),
    })
    .prefault({}),
});

/** Ours: strict, and a misspelt key is refused with a suggestion. */
export const workerSchema = z.strictObject({
  stores: z
    .array(
      z.strictObject({
        name: z
          .string()
          .regex(/^[a-z0-9][a-z0-9-]{0,62}$/, 'must be lower-case letters, digits and dashes')
          .describe('For logs.'),
        address: socketPath.describe('Its unix socket.'),
        root: absolutePath.describe('Its state directory; not inside another one.'),
      }),
    )
    .max(16)
    .default([])
    .describe(
      "Further owners, each with a socket and a store of its own. containerd and buildkitd each delete the snapshots they don't know, so they must never share one.",
    ),
  ociLayers: z
    .enum(['overlayfs', 'block'])
    .default('overlayfs')
    .describe(
      'Layers of plain OCI images: unpacked into directories, or into block layers on which `dir` and `dev` work.',
    ),
  blockd: z
    .strictObject({
      address: socketPath
        .default('/run/overlaybd-blockd/control.sock')
        .describe('Control socket of `overlaybd-blockd`.'),
      spawn: z
        .boolean()
        .default(true)
        .describe(
          'Starts one when nobody answers. Turn it off where a service manager does that. It outlives the snapshotter either way.',
        ),
      runDir: absolutePath
        .default('/run/overlaybd-blockd')
        .describe('Directory for its lock, transient mount points and log, if it is started by the snapshotter.'),
      threads: whole(1, 64).default(4).describe('Request threads per device, if it is started by the snapshotter.'),
      directIo: z
        .boolean()
        .default(false)
        .describe('Reads raw layer data past the page cache, if it is started by the snapshotter.'),
      startTimeoutMs: whole(100, 600_000).default(15_000).describe('Until a started one answers.'),
      attachTimeoutMs: whole(100, 3_600_000)
        .default(60_000)
        .describe('Until a device is there, opening of its layers included.'),
      detachTimeoutMs: whole(100, 3_600_000).default(60_000).describe('Until a device is gone, flushing included.'),
    })
    .prefault({}),
  sectorSizeBytes: z
    .literal([512, 4096])
    .default(4096)
    .describe('Logical sector size of devices. 512 is for file systems with smaller blocks, and is slower.'),
  defaultVirtualSizeGB: whole(1, 65536)
    .default(64)
    .describe(
      'Size of a new image without the label `containerd.io/snapshot/overlaybd/vsize`. Sparse: it costs nothing until it is written.',
    ),
  logLevel: z
    .enum(['trace', 'debug', 'info', 'warn', 'error', 'fatal'])
    .optional()
    .describe('Goes before `verbose`; the flag `--log-level` goes before both.'),
  limits: z
    .strictObject({
      concurrentAttaches: whole(1, 1024)
        .default(16)
        .describe('Devices being attached at one time, per store; more wait in line.'),
      concurrentRemovals: whole(1, 256)
        .default(4)
        .describe('Directory trees being deleted at one time, per store; more wait in line.'),
      drainTimeoutMs: whole(0, 600_000)
        .default(10_000)
        .describe('How long running calls may go on after SIGTERM before they are cut off. Nothing is detached.'),
    })
    .prefault({}),
  metrics: z
    .strictObject({
      host: z
        .string()
        .min(1)
        .default('127.0.0.1')
        .describe('Address the metrics are served on. `0.0.0.0` is every interface: there is no authentication.'),
    })
    .prefault({}),
});

export const configSchema = upstreamSchema.extend({
  overlaybdWorker: workerSchema.prefault({}).describe('What the original does not have. Unknown keys are refused.'),
});
