// Invariants: nothing is sent without a service manager; READY starts the watchdog; a failing notification is only logged.
import assert from 'node:assert/strict';
import { describe, it, mock } from 'node:test';
import { createLog } from './log.ts';
import { ServiceManager } from './systemd.ts';

function manager(socket: string, watchdogUs: number, fail = false) {
  const sent: string[] = [];
  const lines: string[] = [];
  const log = createLog({ name: 't', level: 'info', reportCaller: true }, { write: (line) => void lines.push(line) });
  const send = async (to: string, state: string): Promise<void> => {
    assert.equal(to, socket);
    if (fail) throw new Error('nobody there');
    sent.push(state);
  };
  return { sent, lines, manager: new ServiceManager({ socket, watchdogUs, send, log }) };
}

describe('service manager', () => {
  it('hears READY, the watchdog at half its time, STOPPING', async () => {
    mock.timers.enable({ apis: ['setInterval'] });
    const { sent, manager: systemd } = manager('/run/notify', 30_000_000);
    await systemd.ready();
    mock.timers.tick(31_000);
    await systemd.stopping();
    mock.timers.tick(15_000);
    systemd.close();
    mock.timers.tick(60_000);
    mock.timers.reset();
    assert.deepEqual(sent, ['READY=1', 'WATCHDOG=1', 'WATCHDOG=1', 'STOPPING=1', 'WATCHDOG=1']);
  });

  it('is silent where there is none', async () => {
    const { sent, manager: systemd } = manager('', 1);
    await systemd.ready();
    await systemd.stopping();
    assert.deepEqual(sent, []);
  });

  it('failing, costs a line in the log', async () => {
    const { lines, manager: systemd } = manager('/run/notify', 0, true);
    await systemd.ready();
    assert.equal(lines.length, 1);
    const record = JSON.parse(lines[0] ?? '') as { level: string; state: string; caller: string };
    assert.deepEqual([record.level, record.state], ['warn', 'READY=1']);
    assert.match(record.caller, /^systemd\.ts:\d+$/);
  });
});
