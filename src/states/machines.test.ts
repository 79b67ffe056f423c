/** Invariants: every state × event is decided, as listed here; busy states accept nothing; every effect has a way out
 * when it fails; the drawings and tables are those of the definitions. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, it } from 'node:test';
import { type DeviceState, deviceEvents, deviceMachine } from './device-machine.ts';
import { generated } from './draw.ts';
import { deviceAccepts, snapshotAccepts } from './lifecycle.ts';
import { type SnapshotState, snapshotEvents, snapshotMachine } from './snapshot-machine.ts';

const snapshotAllowed: Readonly<Record<SnapshotState, string>> = {
  absent: 'PREPARE VIEW RECOVER',
  preparing: '',
  viewing: '',
  discarding: '',
  active: 'COMMIT REMOVE RECOVER',
  view: 'REMOVE RECOVER',
  sealing: '',
  committed: 'REMOVE RECOVER',
  removed: 'ERASE RECOVER',
  erasing: '',
  recovering: '',
  faulty: 'REMOVE RECOVER',
};

const deviceAllowed: Readonly<Record<DeviceState, string>> = {
  absent: 'ATTACH RECOVER',
  opening: '',
  attached: 'FORMAT MOUNT DETACH RECOVER',
  formatting: '',
  mounting: '',
  mounted: 'UNMOUNT SEVER RECOVER',
  unmounting: '',
  detaching: '',
  severing: '',
  recovering: '',
  faulty: 'RECOVER',
};

describe('the snapshot machine', () => {
  for (const state of Object.keys(snapshotMachine.states) as SnapshotState[]) {
    it(`${state} accepts exactly: ${snapshotAllowed[state] || 'nothing'}`, () => {
      const accepted = snapshotEvents.filter((type) => snapshotAccepts(state, { type }));
      assert.equal(accepted.join(' '), snapshotAllowed[state]);
    });
  }
});

describe('the device machine', () => {
  for (const state of Object.keys(deviceMachine.states) as DeviceState[]) {
    it(`${state} accepts exactly: ${deviceAllowed[state] || 'nothing'}`, () => {
      const accepted = deviceEvents.filter((type) => deviceAccepts(state, { type }));
      assert.equal(accepted.join(' '), deviceAllowed[state]);
    });
  }
});

describe('both machines', () => {
  for (const machine of [snapshotMachine, deviceMachine]) {
    for (const [name, state] of Object.entries(machine.states)) {
      it(`${machine.id} ${name} is busy exactly when it runs one named effect with both ways out`, () => {
        assert.equal(state.tags.includes('busy'), state.invoke.length === 1);
        const types = Object.keys(state.config.invoke ?? {});
        if (state.invoke.length === 1) for (const key of ['id', 'onDone', 'onError']) assert.ok(types.includes(key));
      });
    }
  }
});

describe('the drawings', () => {
  for (const [path, text] of generated()) {
    it(`${path} is what node src/states/draw.ts writes`, () => {
      assert.equal(readFileSync(join(import.meta.dirname, '../..', path), 'utf8'), text);
    });
  }
});
