/** The part of the configuration that the verbs look at. A plain object, frozen after load; base/config.ts makes it. */
import type { FsDescriptor, WritableLayerType } from '../engine/engine.ts';

export interface WorkerConfig {
  /** Absolute, symlinks resolved. */
  readonly root: string;
  /** `overlayfs`, `dir`, `dev`; anything else behaves as `overlayfs`. */
  readonly rwMode: string;
  readonly writableLayerType: WritableLayerType;
  readonly ociLayers: 'overlayfs' | 'block';
  readonly defaultFs: FsDescriptor;
  /** `fs[;mount options[;mkfs options]]`. InvalidArgument when it can't be read. */
  readonly parseFs: (text: string) => FsDescriptor;
  readonly autoRemoveDev: boolean;
  readonly asyncRemove: boolean;
  readonly runtimeType: string;
  readonly defaultVirtualSizeGB: number;
  readonly sectorSizeBytes: 512 | 4096;
  /** For lazily read layers: which store of a host this is, and hosts reached without TLS. */
  readonly tenant: number;
  readonly mirrorRegistry: readonly { readonly host: string; readonly insecure: boolean }[];
}

/** Limits that are no part of the contract. */
export const limits = {
  /** Layers below a writable one: the engine's format ends at 256 with the upper. */
  lowersMax: 255,
  /** Clients unmount lazily right before Commit: how long it waits for the last of them. */
  busyWaitMs: 500,
  busyStepMs: 25,
  /** How often background work tries to take a busy device down before it leaves it to Cleanup. */
  backgroundTries: 20,
  backgroundStepMs: 100,
  /** Background jobs side by side. */
  backgroundJobsMax: 4,
  listPage: 256,
} as const;
