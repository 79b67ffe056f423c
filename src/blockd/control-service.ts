/** overlaybd.control.v1.BlockDaemon on a unix socket: shape is checked here, the registry does the work. */
import { chmod, mkdir, rename, rm } from 'node:fs/promises';
import { createServer as createHttp1Server } from 'node:http';
import { createServer as createHttp2Server } from 'node:http2';
import { connect as connectSocket, createServer as createSocketServer, type Socket } from 'node:net';
import { dirname, isAbsolute } from 'node:path';
import { create } from '@bufbuild/protobuf';
import { Code, ConnectError, type ConnectRouter } from '@connectrpc/connect';
import { connectNodeAdapter } from '@connectrpc/connect-node';
import type { Logger } from 'pino';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import type { Native } from '../engine/native.ts';
import { fromNative } from '../engine/native-errors.ts';
import { BlockDaemon, type Device, DeviceSchema, DeviceStatsSchema } from '../gen/overlaybd/control/v1/blockd_pb.js';
import type { DeviceRegistry, ServedDevice } from './devices.ts';

const kCodeOfKind = {
  [ErrorKind.NotFound]: Code.NotFound,
  [ErrorKind.AlreadyExists]: Code.AlreadyExists,
  [ErrorKind.InvalidArgument]: Code.InvalidArgument,
  [ErrorKind.FailedPrecondition]: Code.FailedPrecondition,
  [ErrorKind.Unavailable]: Code.Unavailable,
  [ErrorKind.Unimplemented]: Code.Unimplemented,
  [ErrorKind.ResourceExhausted]: Code.ResourceExhausted,
  [ErrorKind.PermissionDenied]: Code.PermissionDenied,
  [ErrorKind.DataLoss]: Code.DataLoss,
  [ErrorKind.Cancelled]: Code.Canceled,
  [ErrorKind.DeadlineExceeded]: Code.DeadlineExceeded,
  [ErrorKind.Internal]: Code.Internal,
} as const satisfies Record<ErrorKind, Code>;

export interface ControlContext {
  readonly registry: DeviceRegistry;
  readonly version: string;
  readonly transports: readonly string[];
  readonly log: Logger;
  /** Called by Shutdown once its answer is on the way. */
  readonly shutdown: (force: boolean) => void;
}

const kNameCharsMax = 255;
const kPathCharsMax = 4095;
const kRequestBytesMax = 64 * 1024;
const kConnectionsMax = 1024;
/** How long a caller may take to read its last answer. */
const kLastAnswersMs = 250;
const kHttp2Preface = 'PRI * HTTP/2.0';

export function routes(context: ControlContext): (router: ConnectRouter) => void {
  const { registry, log } = context;

  /** One line per verb, errors as Connect errors. */
  async function answer<T>(verb: string, fields: Record<string, unknown>, work: () => Promise<T>): Promise<T> {
    const startedMs = performance.now();
    const ms = (): number => Math.round((performance.now() - startedMs) * 1000) / 1000;
    try {
      const value = await work();
      log.info({ verb, ...fields, ms: ms() }, 'served');
      return value;
    } catch (error) {
      const kind = error instanceof SnapshotterError ? error.kind : ErrorKind.Internal;
      const message = error instanceof Error ? error.message : String(error);
      log.warn({ verb, ...fields, ms: ms(), kind, error: message }, 'refused');
      throw new ConnectError(message, kCodeOfKind[kind]);
    }
  }

  return (router) => {
    router.service(BlockDaemon, {
      attach: (request) =>
        answer('attach', { owner: request.owner, id: request.id }, async () => {
          checkOwner(request.owner);
          checkName('id', request.id);
          checkPath('config_path', request.configPath);
          const sectorSizeBytes = request.sectorSizeBytes === 0 ? 4096 : request.sectorSizeBytes;
          if (sectorSizeBytes !== 512 && sectorSizeBytes !== 4096) {
            throw new SnapshotterError(
              ErrorKind.InvalidArgument,
              `sector_size_bytes: 512 or 4096, not ${sectorSizeBytes}`,
            );
          }
          const device = await registry.attach({
            owner: request.owner,
            id: request.id,
            configPath: request.configPath,
            sectorSizeBytes,
            readOnly: request.readOnly,
          });
          return { device: toProto(device, context.transports) };
        }),
      detach: (request) =>
        answer('detach', { owner: request.owner, id: request.id, force: request.force }, async () => {
          checkOwner(request.owner);
          checkName('id', request.id);
          await registry.detach(request.owner, request.id, request.force);
          return {};
        }),
      listDevices: (request) => ({
        devices: registry.list(request.owner).map((device) => toProto(device, context.transports)),
      }),
      flush: (request) =>
        answer('flush', { owner: request.owner, id: request.id }, async () => {
          const device = registry.find(request.owner, request.id);
          if (device === null) throw new SnapshotterError(ErrorKind.NotFound, `device ${request.id}: not attached`);
          try {
            await device.native.flush();
          } catch (error) {
            throw fromNative(`flush ${request.id}`, error);
          }
          return {};
        }),
      status: () => ({
        version: context.version,
        pid: process.pid,
        transports: [...context.transports],
        devices: registry.size,
      }),
      shutdown: (request) =>
        answer('shutdown', { force: request.force }, async () => {
          context.shutdown(request.force);
          return {};
        }),
    });
  };
}

function toProto(device: ServedDevice, transports: readonly string[]): Device {
  const { request, native } = device;
  return create(DeviceSchema, {
    owner: request.owner,
    id: request.id,
    configPath: request.configPath,
    path: native.path,
    readOnly: native.readOnly,
    sizeBytes: native.sizeBytes,
    sectorSizeBytes: request.sectorSizeBytes,
    transport: transports[0] ?? '',
    major: native.major,
    minor: native.minor,
    stats: create(DeviceStatsSchema, native.stats()),
  });
}

function checkName(field: string, value: string): void {
  if (value === '' || value.length > kNameCharsMax || !/^[\w.:@-]+$/.test(value)) {
    throw new SnapshotterError(
      ErrorKind.InvalidArgument,
      `${field}: 1 to ${kNameCharsMax} letters, digits or _ . : @ -`,
    );
  }
}

/** A store names itself by its root directory, so anything a path may hold goes, except what breaks a log line. */
function checkOwner(owner: string): void {
  if (owner === '' || owner.length > kNameCharsMax || /\p{Cc}/u.test(owner)) {
    throw new SnapshotterError(
      ErrorKind.InvalidArgument,
      `owner: 1 to ${kNameCharsMax} characters, none of them a control character`,
    );
  }
}

function checkPath(field: string, value: string): void {
  if (!isAbsolute(value) || value.length > kPathCharsMax || value.includes('\0')) {
    throw new SnapshotterError(ErrorKind.InvalidArgument, `${field}: an absolute path`);
  }
}

export interface ControlServer {
  /** Takes no new connections, lets answers under way go out, cuts what is left after a moment. */
  close(): Promise<void>;
}

/** Listens at `socketPath`: folder 0700 if it is made here, socket 0600, peers of another uid than root and ours are cut
 * off. HTTP/1.1 and HTTP/2 on the same socket, so that curl and gRPC both get through.
 * FailedPrecondition when a living server has the path already.
 * REQUIRES: a lock that no second blockd of the same path holds. */
export async function serveControl(
  socketPath: string,
  native: Native,
  context: ControlContext,
): Promise<ControlServer> {
  await mkdir(dirname(socketPath), { recursive: true, mode: 0o700 });
  if (await answers(socketPath)) {
    throw new SnapshotterError(ErrorKind.FailedPrecondition, `${socketPath}: another blockd listens there`);
  }
  const handler = connectNodeAdapter({ routes: routes(context), readMaxBytes: kRequestBytesMax });
  const http1 = createHttp1Server(handler);
  // Attaching a cold image may take longer than Node's default of five minutes for a whole request.
  http1.requestTimeout = 0;
  const http2 = createHttp2Server(handler);
  const open = new Set<Socket>();
  const server = createSocketServer({ pauseOnConnect: false }, (socket) => {
    open.add(socket);
    socket.once('close', () => open.delete(socket));
    socket.on('error', (error) => context.log.debug({ error: String(error) }, 'a connection broke'));
    try {
      const peer = native.peerCredentials(descriptorOf(socket));
      if (peer.uid !== 0 && peer.uid !== process.getuid?.()) {
        context.log.warn({ uid: peer.uid, pid: peer.pid }, 'refused a peer of another user');
        socket.destroy();
        return;
      }
    } catch (error) {
      context.log.warn({ error: String(error) }, 'refused a peer that cannot be identified');
      socket.destroy();
      return;
    }
    // Whoever connects and says nothing is only watching whether we live.
    socket.once('readable', () => {
      const first: unknown = socket.read();
      if (!(first instanceof Buffer)) return; // ended without a word
      socket.unshift(first);
      (kHttp2Preface.startsWith(first.toString('latin1', 0, kHttp2Preface.length)) ? http2 : http1).emit(
        'connection',
        socket,
      );
    });
  });
  server.maxConnections = kConnectionsMax;
  // Bound under a private name, made private, then renamed: nobody ever meets a socket with the wrong mode, and a stale
  // one is replaced in one step.
  const fresh = `${socketPath}.new`;
  await rm(fresh, { force: true });
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(fresh, () => {
      server.off('error', reject);
      resolve();
    });
  });
  await chmod(fresh, 0o600);
  await rename(fresh, socketPath);
  return {
    close: async () => {
      const closed = new Promise<void>((resolve) => server.close(() => resolve()));
      http1.closeIdleConnections();
      const cut = setTimeout(() => {
        for (const socket of open) socket.destroy();
      }, kLastAnswersMs);
      await closed;
      clearTimeout(cut);
    },
  };
}

function answers(socketPath: string): Promise<boolean> {
  return new Promise((resolve) => {
    const probe = connectSocket(socketPath);
    probe.once('connect', () => {
      probe.destroy();
      resolve(true);
    });
    probe.once('error', () => resolve(false));
  });
}

/** Node has no public accessor for the descriptor of a socket; SO_PEERCRED needs one. */
function descriptorOf(socket: Socket): number {
  const handle = (socket as unknown as { readonly _handle?: { readonly fd?: number } })._handle;
  if (handle?.fd === undefined || handle.fd < 0) throw new Error('a connected socket has a descriptor');
  return handle.fd;
}
