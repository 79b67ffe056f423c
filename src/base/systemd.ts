/** sd_notify: what the service manager is told. Without one nothing is sent. A notification that fails is logged and
 * changes nothing: the daemon works, whoever watches. */
import type { Logger } from './log.ts';

export interface ServiceManagerOptions {
  /** $NOTIFY_SOCKET; '' = there is no service manager. */
  readonly socket: string;
  /** $WATCHDOG_USEC; 0 = no watchdog. */
  readonly watchdogUs: number;
  readonly send: (socket: string, state: string) => Promise<void>;
  readonly log: Logger;
}

export class ServiceManager {
  readonly #options: ServiceManagerOptions;
  #watchdog: NodeJS.Timeout | null = null;

  constructor(options: ServiceManagerOptions) {
    this.#options = options;
  }

  /** From now on the watchdog is fed, by the event loop itself: one that hangs is what it is there to notice. */
  async ready(): Promise<void> {
    await this.#notify('READY=1');
    if (this.#options.socket === '' || this.#options.watchdogUs <= 0) return;
    const halfMs = this.#options.watchdogUs / 2000;
    this.#watchdog = setInterval(() => void this.#notify('WATCHDOG=1'), halfMs).unref();
  }

  /** The watchdog stays fed: draining may take its time. */
  stopping(): Promise<void> {
    return this.#notify('STOPPING=1');
  }

  status(text: string): Promise<void> {
    return this.#notify(`STATUS=${text.replaceAll('\n', ' ')}`);
  }

  close(): void {
    if (this.#watchdog !== null) clearInterval(this.#watchdog);
    this.#watchdog = null;
  }

  async #notify(state: string): Promise<void> {
    if (this.#options.socket === '') return;
    try {
      await this.#options.send(this.#options.socket, state);
    } catch (error) {
      this.#options.log.warn({ err: error, state }, 'service manager could not be told');
    }
  }
}
