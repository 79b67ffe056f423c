/** gRPC on unix sockets: binds services to paths, contains what handlers throw, tells about each call once, drains. Knows
 * nothing of snapshots. One listener per store; each is one grpc-js server, so that they drain together but fail alone. */
import { once } from 'node:events';
import { type DescMethod, type DescService, fromBinary, type MessageShape, toBinary } from '@bufbuild/protobuf';
import {
  type handleServerStreamingCall,
  type handleUnaryCall,
  type MethodDefinition,
  Server,
  ServerCredentials,
  type ServerUnaryCall,
  type ServerWritableStream,
  type ServiceDefinition,
  type sendUnaryData,
  status,
  type UntypedServiceImplementation,
} from '@grpc/grpc-js';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import { toStatus, type WireStatus } from './status.ts';
import { claimSocketPlace, type SocketPlace } from './unix-socket.ts';

/** What containerd's clients and servers allow. */
export const kMessageMaxBytes = 16 * 1024 * 1024;

/** Between the last answer and its connection's end. */
const kLastAnswersMs = 500;

export interface CallContext {
  /** Aborted when the client gives up or goes away. */
  readonly signal: AbortSignal;
}

/** What a log line and a metric need to know of a call. Never labels. */
export interface CallFacts {
  /** Of the socket it came in by. */
  readonly address: string;
  readonly service: string;
  readonly verb: string;
  /** The names in the request. */
  readonly names: Readonly<Record<string, string>>;
  /** From the containerd-namespace header, which is optional and trusted for nothing. */
  readonly namespace: string | null;
}

export interface FinishedCall extends CallFacts {
  readonly milliseconds: number;
  readonly code: status;
  /** What was thrown; null when the call succeeded. */
  readonly error: unknown;
  /** False also for an error that the protocol expects. */
  readonly failed: boolean;
}

/** One rpc. `run` gives one message, or yields any number of them for a streaming method. */
export type Handler<M extends DescMethod> = {
  readonly names: (request: MessageShape<M['input']>) => Readonly<Record<string, string>>;
  /** An error of this kind answers this request as it should be answered: it is not counted as a failure. */
  readonly expects?: (request: MessageShape<M['input']>) => ErrorKind | null;
} & (M['methodKind'] extends 'server_streaming'
  ? {
      readonly run: (
        request: MessageShape<M['input']>,
        context: CallContext,
      ) => AsyncIterable<MessageShape<M['output']>>;
    }
  : { readonly run: (request: MessageShape<M['input']>, context: CallContext) => Promise<MessageShape<M['output']>> });

/** Every method of a service: leaving one out does not compile. */
export type Handlers<S extends DescService> = { readonly [K in keyof S['method']]: Handler<S['method'][K]> };

export interface ServerOptions {
  /** Called once for each call after it was answered. Must not throw. */
  readonly onFinished: (call: FinishedCall) => void;
}

/** The request as read from the wire, or why it could not be: a malformed one is the caller's fault, and grpc-js would
 * call it Internal. */
type Decoded = { readonly message: unknown } | { readonly problem: string };

type Unary = ServerUnaryCall<Decoded, unknown>;
type Streaming = ServerWritableStream<Decoded, unknown>;
type AnyCall = Unary | Streaming;

interface AnyHandler {
  readonly names: (request: unknown) => Readonly<Record<string, string>>;
  readonly expects?: (request: unknown) => ErrorKind | null;
  readonly run: (request: unknown, context: CallContext) => unknown;
}

interface Listener {
  readonly address: string;
  readonly server: Server;
  readonly place: SocketPlace;
}

export class RpcServer {
  readonly #options: ServerOptions;
  readonly #listeners: Listener[] = [];
  readonly #running = new Map<AnyCall, CallFacts & { readonly startedAt: number }>();
  #draining: Promise<void> | null = null;
  /** Set while draining. */
  #onIdle: (() => void) | null = null;

  constructor(options: ServerOptions) {
    this.#options = options;
  }

  /** Serves `service` at the unix socket `address` from now on. Errors: those of claimSocketPlace, Unavailable. */
  async listen<S extends DescService>(address: string, service: S, handlers: Handlers<S>): Promise<void> {
    const server = new Server({
      'grpc.max_receive_message_length': kMessageMaxBytes,
      'grpc.max_send_message_length': kMessageMaxBytes,
    });
    server.addService(definitionOf(service), this.#implementationOf(address, service, handlers));
    const place = await claimSocketPlace(address);
    try {
      await new Promise<void>((resolve, reject) => {
        server.bindAsync(`unix:${place.bindPath}`, ServerCredentials.createInsecure(), (error) => {
          if (error === null) resolve();
          else reject(new SnapshotterError(ErrorKind.Unavailable, `listen on ${address}: ${error.message}`));
        });
      });
      await place.publish();
    } catch (error) {
      server.forceShutdown();
      await place.withdraw();
      throw error;
    }
    this.#listeners.push({ address, server, place });
  }

  get addresses(): readonly string[] {
    return this.#listeners.map((listener) => listener.address);
  }

  /** Calls not answered yet, with their age. */
  inFlight(): readonly (CallFacts & { readonly milliseconds: number })[] {
    const now = performance.now();
    return Array.from(this.#running.values(), ({ startedAt, ...facts }) => ({
      ...facts,
      milliseconds: Math.round(now - startedAt),
    }));
  }

  /** Takes no new calls, lets running ones end, cuts them off after `deadlineMs`, takes the socket paths away. A client
   * that merely stays connected holds nothing up. A further call joins the first. */
  drain(deadlineMs: number): Promise<void> {
    this.#draining ??= this.#drain(deadlineMs);
    return this.#draining;
  }

  async #drain(deadlineMs: number): Promise<void> {
    const closed = Promise.all(
      this.#listeners.map(({ server }) => new Promise<void>((done) => server.tryShutdown(() => done()))),
    );
    const cutOff = Promise.withResolvers<void>();
    const deadline = setTimeout(cutOff.resolve, deadlineMs);
    const answered = this.#running.size === 0 ? Promise.resolve() : new Promise<void>((idle) => (this.#onIdle = idle));
    await Promise.race([answered, cutOff.promise]);
    // The last answers are on their way; clients hang up when they have them.
    const lastWords = setTimeout(cutOff.resolve, Math.min(deadlineMs, kLastAnswersMs));
    await Promise.race([closed, cutOff.promise]);
    clearTimeout(deadline);
    clearTimeout(lastWords);
    for (const { server, place } of this.#listeners) {
      server.forceShutdown();
      await place.withdraw();
    }
  }

  #implementationOf<S extends DescService>(
    address: string,
    service: S,
    handlers: Handlers<S>,
  ): UntypedServiceImplementation {
    const implementation: UntypedServiceImplementation = {};
    for (const method of service.methods) {
      const handler = handlers[method.localName] as unknown as AnyHandler;
      implementation[method.localName] =
        method.methodKind === 'server_streaming'
          ? this.#streaming(address, method, handler)
          : this.#unary(address, method, handler);
    }
    return implementation;
  }

  #unary(address: string, method: DescMethod, handler: AnyHandler): handleUnaryCall<Decoded, unknown> {
    return (call: Unary, reply: sendUnaryData<unknown>) => {
      const answer = async (): Promise<void> => {
        const result = await this.#contained(address, method, handler, call, (request, context) =>
          handler.run(request, context),
        );
        if (result.failure === null) reply(null, result.value);
        else reply(result.failure);
      };
      this.#supervise(answer());
    };
  }

  #streaming(address: string, method: DescMethod, handler: AnyHandler): handleServerStreamingCall<Decoded, unknown> {
    return (call: Streaming) => {
      const answer = async (): Promise<void> => {
        const result = await this.#contained(address, method, handler, call, async (request, context) => {
          for await (const message of handler.run(request, context) as AsyncIterable<unknown>) {
            context.signal.throwIfAborted();
            // The client reads slower than we list: wait for it, hold one batch.
            if (!call.write(message)) await once(call, 'drain', { signal: context.signal });
          }
        });
        if (result.failure === null) call.end();
        else call.emit('error', result.failure);
      };
      this.#supervise(answer());
    };
  }

  /** A handler's outcome, whatever it does; never rejects by the handler's fault. */
  async #contained(
    address: string,
    method: DescMethod,
    handler: AnyHandler,
    call: AnyCall,
    run: (request: unknown, context: CallContext) => unknown,
  ): Promise<{ readonly value: unknown; readonly failure: WireStatus | null }> {
    const startedAt = performance.now();
    const abort = new AbortController();
    const onCancelled = (): void => abort.abort();
    call.on('cancelled', onCancelled);
    let facts: CallFacts = {
      address,
      service: method.parent.typeName,
      verb: method.localName,
      names: {},
      namespace: namespaceOf(call),
    };
    let value: unknown;
    let error: unknown = null;
    let failure: WireStatus | null = null;
    let expected: ErrorKind | null = null;
    try {
      const decoded = call.request;
      if ('problem' in decoded) throw new SnapshotterError(ErrorKind.InvalidArgument, decoded.problem);
      facts = { ...facts, names: handler.names(decoded.message) };
      expected = handler.expects?.(decoded.message) ?? null;
      this.#running.set(call, { ...facts, startedAt });
      value = await run(decoded.message, { signal: abort.signal });
    } catch (thrown) {
      error =
        abort.signal.aborted && !(thrown instanceof SnapshotterError)
          ? new SnapshotterError(ErrorKind.Cancelled, `${facts.verb}: the client gave up`, { cause: thrown })
          : thrown;
      failure = toStatus(error);
    }
    this.#running.delete(call);
    if (this.#running.size === 0) this.#onIdle?.();
    call.off('cancelled', onCancelled);
    this.#options.onFinished({
      ...facts,
      milliseconds: performance.now() - startedAt,
      code: failure?.code ?? status.OK,
      error,
      failed: failure !== null && !(error instanceof SnapshotterError && error.kind === expected),
    });
    return { value, failure };
  }

  /** An answer that could not be sent has nobody left to hear of it: the call's end was told already. */
  #supervise(answer: Promise<void>): void {
    answer.catch(() => undefined);
  }
}

function namespaceOf(call: AnyCall): string | null {
  // With several values the first is the newest. HTTP/2 in Node joins them; a namespace has no comma.
  const [first] = call.metadata.get('containerd-namespace');
  return typeof first === 'string' ? (first.split(',', 1)[0] ?? '').slice(0, 256) : null;
}

/** The same bytes: an answer may be megabytes. */
const bufferOf = (bytes: Uint8Array): Buffer => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);

function definitionOf(service: DescService): ServiceDefinition {
  const definition: Record<string, MethodDefinition<unknown, unknown>> = {};
  for (const method of service.methods) {
    definition[method.localName] = {
      path: `/${service.typeName}/${method.name}`,
      requestStream: false,
      responseStream: method.methodKind === 'server_streaming',
      requestSerialize: (message) => bufferOf(toBinary(method.input, message as MessageShape<typeof method.input>)),
      requestDeserialize: (bytes): Decoded => {
        try {
          return { message: fromBinary(method.input, bytes) };
        } catch (error) {
          return { problem: `${method.input.name}: ${error instanceof Error ? error.message : String(error)}` };
        }
      },
      responseSerialize: (message) => bufferOf(toBinary(method.output, message as MessageShape<typeof method.output>)),
      responseDeserialize: (bytes) => fromBinary(method.output, bytes),
    };
  }
  return definition;
}
