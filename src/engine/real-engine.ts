/** The engine on the real world: addon, programs, blockd. */
import { BlockdDevices, type DeviceTimeouts } from './devices.ts';
import type { Engine } from './engine.ts';
import { createFiles } from './files.ts';
import { type BlockdEvents, type BlockdOptions, createHostProcess, type HostProcess } from './host-process.ts';
import { createLayers } from './layers.ts';
import { createMounts } from './mounts.ts';
import type { Native } from './native.ts';

export interface EngineOptions {
  readonly native: Native;
  /** Identity of the store: devices of other owners are not seen. */
  readonly owner: string;
  readonly blockd: BlockdOptions;
  readonly events?: BlockdEvents;
  readonly timeouts?: DeviceTimeouts;
}

export interface RealEngine extends Engine {
  readonly blockd: HostProcess;
  /** Lets go of blockd, which goes on serving. Idempotent. */
  close(): void;
}

export function createEngine(options: EngineOptions): RealEngine {
  const blockd = createHostProcess(options.blockd, options.events);
  const layers = createLayers(options.native);
  return {
    layers,
    devices: new BlockdDevices(blockd, options.owner, layers.readImageConfig, options.timeouts),
    mounts: createMounts(options.native),
    files: createFiles(options.native),
    blockd,
    close: () => blockd.close(),
  };
}
