/** JSON lines on stdout: constant messages, values as fields. Written synchronously: the line before a crash is the one
 * that matters. */
import { type DestinationStream, type Logger, pino, stdSerializers, stdTimeFunctions } from 'pino';
import type { LogLevel } from './config.ts';

export type { Logger } from 'pino';

export interface LogOptions {
  readonly name: string;
  readonly level: LogLevel;
  /** Adds `caller`: costs a stack trace for every record. */
  readonly reportCaller: boolean;
}

export const logLevels: readonly LogLevel[] = ['trace', 'debug', 'info', 'warn', 'error', 'fatal'];

export function createLog(options: LogOptions, destination?: DestinationStream): Logger {
  const settings = {
    name: options.name,
    level: options.level,
    timestamp: stdTimeFunctions.isoTime,
    formatters: { level: (label: string) => ({ level: label }) },
    serializers: { err: stdSerializers.err },
    ...(options.reportCaller ? { mixin: () => ({ caller: caller() }) } : {}),
  };
  return destination === undefined ? pino(settings) : pino(settings, destination);
}

/** The first place in a stack that is neither this file nor pino. */
function caller(): string {
  const lines = new Error().stack?.split('\n').slice(1) ?? [];
  const line = lines.find((text) => !text.includes('/node_modules/') && !text.includes(import.meta.filename));
  return /([^/\s(]+:\d+):\d+\)?$/.exec(line ?? '')?.[1] ?? 'unknown';
}
