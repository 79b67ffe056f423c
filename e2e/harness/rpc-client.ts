/** A client of the snapshots service on a unix socket: what containerd sends, typed. */
import {
  create,
  type DescMessage,
  fromBinary,
  type MessageInitShape,
  type MessageShape,
  toBinary,
} from '@bufbuild/protobuf';
import { EmptySchema } from '@bufbuild/protobuf/wkt';
import { type CallOptions, Client, credentials, Metadata, type ServiceError } from '@grpc/grpc-js';
import {
  CleanupRequestSchema,
  CommitSnapshotRequestSchema,
  type Info,
  ListSnapshotsRequestSchema,
  ListSnapshotsResponseSchema,
  MountsRequestSchema,
  MountsResponseSchema,
  PrepareSnapshotRequestSchema,
  PrepareSnapshotResponseSchema,
  RemoveSnapshotRequestSchema,
  StatSnapshotRequestSchema,
  StatSnapshotResponseSchema,
  UpdateSnapshotRequestSchema,
  UpdateSnapshotResponseSchema,
  UsageRequestSchema,
  UsageResponseSchema,
  ViewSnapshotRequestSchema,
  ViewSnapshotResponseSchema,
} from '../../src/gen/services/snapshots/v1/snapshots_pb.js';
import type { Labels, Mount, Usage } from '../../src/worker/worker.ts';

export { Kind } from '../../src/gen/services/snapshots/v1/snapshots_pb.js';
export type { Info };

export interface SnapshotsClientOptions {
  /** Field "snapshotter" of every request. Default overlaybd. */
  readonly snapshotter?: string;
  /** Sent with every call, e.g. containerd-namespace. */
  readonly headers?: Readonly<Record<string, string>>;
  /** Per call. Default 60 s. */
  readonly deadlineMs?: number;
  /** Of a message, both ways, in bytes. Default: containerd's limit, 16 MiB. */
  readonly messageMax?: number;
}

const service = '/containerd.services.snapshots.v1.Snapshots';
/** containerd's limit, both ways. */
const messageMax = 16 << 20;

/** Errors of every call: grpc-js's ServiceError with `code` and `details`. */
export class SnapshotsClient implements Disposable {
  readonly #client: Client;
  readonly #snapshotter: string;
  readonly #headers: Readonly<Record<string, string>>;
  readonly #deadlineMs: number;

  constructor(socket: string, options: SnapshotsClientOptions = {}) {
    this.#client = new Client(`unix:${socket}`, credentials.createInsecure(), {
      'grpc.max_receive_message_length': options.messageMax ?? messageMax,
      'grpc.max_send_message_length': options.messageMax ?? messageMax,
      // A restarted daemon is found again as fast as containerd finds it.
      'grpc.initial_reconnect_backoff_ms': 50,
      'grpc.max_reconnect_backoff_ms': 500,
      // Two clients of one test are two connections.
      'grpc.use_local_subchannel_pool': 1,
    });
    this.#snapshotter = options.snapshotter ?? 'overlaybd';
    this.#headers = options.headers ?? {};
    this.#deadlineMs = options.deadlineMs ?? 60_000;
  }

  async prepare(key: string, parent = '', labels: Labels = {}): Promise<readonly Mount[]> {
    const request = { snapshotter: this.#snapshotter, key, parent, labels };
    return (await this.unary('Prepare', PrepareSnapshotRequestSchema, request, PrepareSnapshotResponseSchema)).mounts;
  }

  async view(key: string, parent = '', labels: Labels = {}): Promise<readonly Mount[]> {
    const request = { snapshotter: this.#snapshotter, key, parent, labels };
    return (await this.unary('View', ViewSnapshotRequestSchema, request, ViewSnapshotResponseSchema)).mounts;
  }

  async mounts(key: string): Promise<readonly Mount[]> {
    const request = { snapshotter: this.#snapshotter, key };
    return (await this.unary('Mounts', MountsRequestSchema, request, MountsResponseSchema)).mounts;
  }

  /** `parent` only for a rebase, see the proto. */
  async commit(name: string, key: string, labels: Labels = {}, parent = ''): Promise<void> {
    const request = { snapshotter: this.#snapshotter, name, key, labels, parent };
    await this.unary('Commit', CommitSnapshotRequestSchema, request, EmptySchema);
  }

  async remove(key: string): Promise<void> {
    await this.unary('Remove', RemoveSnapshotRequestSchema, { snapshotter: this.#snapshotter, key }, EmptySchema);
  }

  async stat(key: string): Promise<Info> {
    const request = { snapshotter: this.#snapshotter, key };
    return present((await this.unary('Stat', StatSnapshotRequestSchema, request, StatSnapshotResponseSchema)).info);
  }

  /** No paths = every mutable field is replaced. */
  async update(name: string, labels: Labels, paths: readonly string[] = []): Promise<Info> {
    const request = {
      snapshotter: this.#snapshotter,
      info: { name, labels },
      ...(paths.length > 0 ? { updateMask: { paths: [...paths] } } : {}),
    };
    return present(
      (await this.unary('Update', UpdateSnapshotRequestSchema, request, UpdateSnapshotResponseSchema)).info,
    );
  }

  async usage(key: string): Promise<Usage> {
    const request = { snapshotter: this.#snapshotter, key };
    const { size, inodes } = await this.unary('Usage', UsageRequestSchema, request, UsageResponseSchema);
    return { sizeBytes: size, inodes };
  }

  async cleanup(): Promise<void> {
    await this.unary('Cleanup', CleanupRequestSchema, { snapshotter: this.#snapshotter }, EmptySchema);
  }

  async list(...filters: readonly string[]): Promise<readonly Info[]> {
    return (await this.listBatches(...filters)).flat();
  }

  /** One element per message of the stream. */
  listBatches(...filters: readonly string[]): Promise<readonly (readonly Info[])[]> {
    const batches: Info[][] = [];
    const { promise, resolve, reject } = Promise.withResolvers<readonly (readonly Info[])[]>();
    const stream = this.#client.makeServerStreamRequest(
      `${service}/List`,
      (message: Uint8Array) => Buffer.from(message),
      (bytes: Buffer) => fromBinary(ListSnapshotsResponseSchema, bytes),
      toBinary(
        ListSnapshotsRequestSchema,
        create(ListSnapshotsRequestSchema, { snapshotter: this.#snapshotter, filters: [...filters] }),
      ),
      this.#metadata(),
      this.#callOptions(),
    );
    stream.on('data', (message: MessageShape<typeof ListSnapshotsResponseSchema>) => batches.push(message.info));
    stream.on('error', reject);
    stream.on('end', () => resolve(batches));
    return promise;
  }

  /** Any method with any message: for torture of the wire. Aborting `signal` cancels the call. */
  unary<Request extends DescMessage, Response extends DescMessage>(
    method: string,
    requestSchema: Request,
    request: MessageInitShape<Request>,
    responseSchema: Response,
    signal?: AbortSignal,
  ): Promise<MessageShape<Response>> {
    return this.raw(method, toBinary(requestSchema, create(requestSchema, request)), signal).then((bytes) =>
      fromBinary(responseSchema, bytes),
    );
  }

  /** The same with bytes that need not be a message at all. */
  raw(method: string, request: Uint8Array, signal?: AbortSignal): Promise<Uint8Array> {
    const { promise, resolve, reject } = Promise.withResolvers<Uint8Array>();
    const call = this.#client.makeUnaryRequest(
      `${service}/${method}`,
      (message: Uint8Array) => Buffer.from(message),
      (bytes: Buffer) => bytes,
      request,
      this.#metadata(),
      this.#callOptions(),
      (error: ServiceError | null, response?: Buffer) => {
        if (error !== null) reject(error);
        else resolve(response ?? Buffer.alloc(0));
      },
    );
    signal?.addEventListener('abort', () => call.cancel(), { once: true });
    return promise;
  }

  [Symbol.dispose](): void {
    this.#client.close();
  }

  #metadata(): Metadata {
    const metadata = new Metadata();
    for (const [name, value] of Object.entries(this.#headers)) metadata.set(name, value);
    return metadata;
  }

  #callOptions(): CallOptions {
    return { deadline: Date.now() + this.#deadlineMs };
  }
}

function present(info: Info | undefined): Info {
  if (info === undefined) throw new Error('the answer carries no info');
  return info;
}
