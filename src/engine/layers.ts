/** Layer files: the writable pair, its sealing, the image config. Each function may be cut at any point by a crash and
 * repeated: it looks at what is there, finishes it, and never destroys a file that holds somebody's data. */
import { mkdir, open, rename, rm, stat } from 'node:fs/promises';
import { dirname } from 'node:path';
import { ErrorKind, SnapshotterError } from '../base/errors.ts';
import { replaceFile } from './durable-file.ts';
import { type CreateWritable, type ImageConfig, type LayerInfo, type Layers, WritableLayerType } from './engine.ts';
import { formatImageConfig, kConfigMaxBytes, parseImageConfig } from './image-config.ts';
import { errnoName, fromIo } from './io-errors.ts';
import type { Native } from './native.ts';
import { fromNative } from './native-errors.ts';
import { runProgram } from './programs.ts';

/** formats.md §2: header length, and where its flags lie. Read here only to tell the two writable types apart. */
const kHeaderBytes = 4096;
const kFlagsOffset = 28;
const kSparseFlag = 1 << 4;
const kBlockBytes = 512;
/** An empty sparse data file has its header block, and what the file system needs for its map, allocated. */
const kEmptySparseMaxBytes = 4 * kHeaderBytes;

/** A copy between file systems moves up to the whole writable layer. */
const kCopyTimeoutMs = 30 * 60 * 1000;

interface FileFacts {
  readonly sizeBytes: number;
  readonly allocatedBytes: number;
}

async function factsOf(path: string): Promise<FileFacts | null> {
  try {
    const facts = await stat(path);
    if (!facts.isFile()) throw new SnapshotterError(ErrorKind.FailedPrecondition, `${path} is not a regular file`);
    return { sizeBytes: facts.size, allocatedBytes: facts.blocks * kBlockBytes };
  } catch (error) {
    if (errnoName(error) === 'ENOENT') return null;
    throw fromIo(`stat ${path}`, error);
  }
}

/** The header block of a layer file; null when the file is shorter, or the block holds nothing but zeros (a power cut
 * between creation and the first fsync leaves that). */
async function readHeader(path: string): Promise<Buffer | null> {
  const file = await open(path, 'r');
  try {
    const header = Buffer.alloc(kHeaderBytes);
    const { bytesRead } = await file.read(header, 0, kHeaderBytes, 0);
    return bytesRead < kHeaderBytes || header.every((byte) => byte === 0) ? null : header;
  } finally {
    await file.close();
  }
}

export function createLayers(native: Native): Layers {
  const sync = async (directory: string): Promise<void> => {
    try {
      await native.syncDirectory(directory);
    } catch (error) {
      throw fromNative(`sync directory ${directory}`, error);
    }
  };
  const inspect = async (path: string): Promise<LayerInfo> => {
    try {
      return await native.inspectLayer(path);
    } catch (error) {
      throw fromNative(`inspect layer ${path}`, error);
    }
  };
  return {
    createWritable: (request) => createWritable(native, request),
    seal: (data, index, sealed) => seal({ native, sync, inspect }, data, index, sealed),
    adopt: (from, to) => adopt({ native, sync, inspect }, from, to),
    inspect,
    writeImageConfig: async (path, config) => {
      const before = await readText(path);
      await replaceFile(path, formatImageConfig(config, before), 0o600);
      await sync(dirname(path));
    },
    readImageConfig: async (path): Promise<ImageConfig> => {
      const text = await readText(path);
      if (text === null) throw new SnapshotterError(ErrorKind.NotFound, `image config ${path} does not exist`);
      return parseImageConfig(path, text);
    },
  };
}

async function createWritable(native: Native, request: CreateWritable): Promise<void> {
  const { data, index, type, virtualSizeBytes } = request;
  const context = `create writable layer ${data}`;
  const sparse = type === WritableLayerType.Sparse;
  const found = await inspectPair(request);
  switch (found.state) {
    case 'complete':
      return requireSameGeometry(native, request);
    case 'holds-data':
      throw new SnapshotterError(ErrorKind.DataLoss, `${context}: ${found.reason}`);
    case 'half-made':
    case 'absent':
      break;
  }
  try {
    for (const file of [index, data]) {
      // Outside a snapshot directory (the active.path label) the place may not exist yet.
      await mkdir(dirname(file), { recursive: true, mode: 0o700 });
      await rm(file, { force: true });
    }
  } catch (error) {
    throw fromIo(context, error);
  }
  try {
    await native.createUpper({ data, index, virtualSizeBytes, sparse, parentUuid: null });
    await native.syncDirectory(dirname(data));
    if (dirname(index) !== dirname(data)) await native.syncDirectory(dirname(index));
  } catch (error) {
    await removeQuietly([data, index]);
    throw fromNative(context, error);
  }
}

type PairState =
  | { readonly state: 'absent' }
  | { readonly state: 'half-made' }
  | { readonly state: 'complete' }
  | { readonly state: 'holds-data'; readonly reason: string };

/** What an earlier createWritable, or its crash, left behind. A lone file that already holds writes is not half-made:
 * its partner was lost, and making the pair anew would destroy it. */
async function inspectPair({ data, index }: CreateWritable): Promise<PairState> {
  const [dataFacts, indexFacts] = [await factsOf(data), await factsOf(index)];
  if (dataFacts === null && indexFacts === null) return { state: 'absent' };
  try {
    const header = dataFacts === null ? null : await readHeader(data);
    const sparse = header !== null && (header.readUInt32LE(kFlagsOffset) & kSparseFlag) !== 0;
    if (header !== null && indexFacts !== null) {
      // A sparse layer needs no index bytes; an append layer's index has a header of its own.
      if (sparse || (indexFacts.sizeBytes >= kHeaderBytes && (await readHeader(index)) !== null)) {
        return { state: 'complete' };
      }
    }
    // Without a readable header only what is allocated tells writes from the empty space of a sparse layer.
    const dataWritten =
      dataFacts !== null &&
      (header === null || sparse
        ? dataFacts.allocatedBytes > kEmptySparseMaxBytes
        : dataFacts.sizeBytes > kHeaderBytes);
    if (dataWritten) return { state: 'holds-data', reason: `the data file holds writes but ${index} is unusable` };
    if (header === null && indexFacts !== null && indexFacts.sizeBytes > kHeaderBytes) {
      return { state: 'holds-data', reason: `${index} records writes but the data file is unusable` };
    }
    return { state: 'half-made' };
  } catch (error) {
    throw fromIo(`create writable layer ${data}`, error);
  }
}

async function requireSameGeometry(native: Native, request: CreateWritable): Promise<void> {
  const { data, type, virtualSizeBytes } = request;
  const context = `writable layer ${data} exists already`;
  let info: LayerInfo;
  try {
    info = await native.inspectLayer(data);
  } catch (error) {
    throw fromNative(context, error);
  }
  if (info.kind !== 'lsmt-writable') {
    throw new SnapshotterError(ErrorKind.FailedPrecondition, `${context} and is ${info.kind}, not writable`);
  }
  const header = await readHeader(data);
  const sparse = header !== null && (header.readUInt32LE(kFlagsOffset) & kSparseFlag) !== 0;
  const found = sparse ? WritableLayerType.Sparse : WritableLayerType.Append;
  if (found !== type) {
    throw new SnapshotterError(ErrorKind.FailedPrecondition, `${context} as ${found}, wanted ${type}`);
  }
  // 0 = inherited: an engine writes the inherited size into the header when it first opens the stack.
  if (virtualSizeBytes !== 0n && info.virtualSizeBytes !== virtualSizeBytes) {
    throw new SnapshotterError(
      ErrorKind.FailedPrecondition,
      `${context} with ${info.virtualSizeBytes} bytes, wanted ${virtualSizeBytes}`,
    );
  }
}

interface SealTools {
  readonly native: Native;
  readonly sync: (directory: string) => Promise<void>;
  readonly inspect: (path: string) => Promise<LayerInfo>;
}

/** Steps: seal in place (durable), rename, sync the directory, remove the index. The index goes last, so a data file
 * without one has always been sealed and renamed, or was never complete. */
async function seal(tools: SealTools, data: string, index: string, sealed: string): Promise<void> {
  const context = `seal ${data}`;
  const [dataFacts, sealedFacts] = [await factsOf(data), await factsOf(sealed)];
  if (dataFacts === null) {
    if (sealedFacts === null) throw new SnapshotterError(ErrorKind.NotFound, `${context}: no such file`);
    await requireSealed(tools, context, sealed);
    return finishSeal(tools, index, sealed);
  }
  if (sealedFacts !== null) {
    // Only a copy between file systems leaves both: the copy is complete (it was renamed into place), its source remains.
    await requireSealed(tools, context, sealed);
    if (dataFacts.sizeBytes !== sealedFacts.sizeBytes) {
      throw new SnapshotterError(ErrorKind.FailedPrecondition, `${context}: ${sealed} exists and is another layer`);
    }
    await requireSealed(tools, context, data);
    await removeFile(context, data);
    return finishSeal(tools, index, sealed);
  }
  try {
    await tools.native.sealUpper(data, index);
  } catch (error) {
    throw fromNative(context, error);
  }
  try {
    await rename(data, sealed);
  } catch (error) {
    if (errnoName(error) !== 'EXDEV') throw fromIo(context, error);
    await copyAcross(tools, data, sealed);
    await removeFile(context, data);
  }
  await finishSeal(tools, index, sealed);
}

/** The copy is complete when it has its name, so a repetition has only the source to remove. */
async function adopt(tools: SealTools, from: string, to: string): Promise<void> {
  const context = `adopt ${from}`;
  const [source, target] = [await factsOf(from), await factsOf(to)];
  if (target === null) {
    if (source === null) throw new SnapshotterError(ErrorKind.NotFound, `${context}: no such file`);
    try {
      await rename(from, to);
    } catch (error) {
      if (errnoName(error) !== 'EXDEV') throw fromIo(context, error);
      await copyAcross(tools, from, to);
    }
  }
  await requireSealed(tools, context, to);
  await removeFile(context, from);
  await tools.sync(dirname(to));
}

/** The index is of no use once the sealed file has its final name for good. */
async function finishSeal(tools: SealTools, index: string, sealed: string): Promise<void> {
  await tools.sync(dirname(sealed));
  await removeFile(`seal ${sealed}`, index);
}

/** The writable pair lies on another file system than the snapshot (the active.path label). Holes stay holes: a sparse
 * layer whose holes were filled would hide the layers below. */
async function copyAcross(tools: SealTools, data: string, sealed: string): Promise<void> {
  const temporary = `${sealed}.copy`;
  try {
    await runProgram('cp', ['--sparse=auto', '--reflink=auto', '--', data, temporary], { timeoutMs: kCopyTimeoutMs });
    const file = await open(temporary, 'r+');
    try {
      await file.sync();
    } finally {
      await file.close();
    }
    await rename(temporary, sealed);
  } catch (error) {
    await removeQuietly([temporary]);
    throw fromIo(`copy ${data} to ${sealed}`, error);
  }
  await tools.sync(dirname(sealed));
}

async function requireSealed(tools: SealTools, context: string, path: string): Promise<void> {
  const { kind } = await tools.inspect(path);
  if (kind !== 'lsmt-sealed') throw new SnapshotterError(ErrorKind.DataLoss, `${context}: ${path} is ${kind}`);
}

async function removeFile(context: string, path: string): Promise<void> {
  try {
    await rm(path, { force: true });
  } catch (error) {
    throw fromIo(context, error);
  }
}

/** For the way out of a failure, which is what gets reported. */
async function removeQuietly(paths: readonly string[]): Promise<void> {
  for (const path of paths) {
    await rm(path, { force: true }).catch(() => {
      // The next createWritable meets the leftover and judges it.
    });
  }
}

/** null = absent. */
async function readText(path: string): Promise<string | null> {
  try {
    const file = await open(path, 'r');
    try {
      const { size } = await file.stat();
      if (size > kConfigMaxBytes) {
        throw new SnapshotterError(ErrorKind.DataLoss, `image config ${path}: ${size} bytes is too long`);
      }
      return await file.readFile('utf8');
    } finally {
      await file.close();
    }
  } catch (error) {
    if (errnoName(error) === 'ENOENT') return null;
    throw fromIo(`read ${path}`, error);
  }
}
