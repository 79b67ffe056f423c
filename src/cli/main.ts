/** The `overlaybd` command for people. What programs execute (overlaybd-commit and its kin) is C++, in native/tools. */
import { Command } from 'commander';
import { kDefaultConfigPath, loadConfig, storesOf } from '../base/config.ts';
import { SnapshotterError } from '../base/errors.ts';
import { createHostProcess } from '../engine/host-process.ts';
import { loadNative, nativePath } from '../engine/native.ts';
import type { Device } from '../gen/overlaybd/control/v1/blockd_pb.js';

interface SocketFlag {
  readonly socket: string;
}

const version = loadNative(nativePath()).version;

function write(text: string): void {
  process.stdout.write(`${text}\n`);
}

function client(flags: SocketFlag) {
  return createHostProcess({ socketPath: flags.socket, spawn: null, version }).client;
}

/** Columns as wide as their widest cell, two spaces apart. */
function table(rows: readonly (readonly string[])[]): string {
  const widths: number[] = [];
  for (const row of rows) {
    row.forEach((cell, column) => {
      widths[column] = Math.max(widths[column] ?? 0, cell.length);
    });
  }
  return rows
    .map((row) =>
      row.map((cell, column) => (column === row.length - 1 ? cell : cell.padEnd(widths[column] ?? 0))).join('  '),
    )
    .join('\n');
}

function size(bytes: bigint): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let value = Number(bytes);
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${Number.isInteger(value) ? value : value.toFixed(1)} ${units[unit] ?? ''}`;
}

function row(device: Device): readonly string[] {
  return [
    device.path,
    device.owner,
    device.id,
    device.readOnly ? 'ro' : 'rw',
    size(device.sizeBytes),
    device.transport,
    size(device.stats?.readBytes ?? 0n),
    size(device.stats?.writeBytes ?? 0n),
    String(device.stats?.errors ?? 0n),
    device.configPath,
  ];
}

const program = new Command('overlaybd').description('Looks at what the overlaybd daemons are doing.').version(version);

program
  .command('devices')
  .description('list the devices that overlaybd-blockd serves')
  .option('--socket <path>', "blockd's control socket", '/run/overlaybd-blockd/control.sock')
  .option('--owner <name>', 'of one store only', '')
  .option('--json', 'for programs', false)
  .action(async (flags: SocketFlag & { readonly owner: string; readonly json: boolean }) => {
    const { devices } = await client(flags).listDevices({ owner: flags.owner });
    if (flags.json) {
      write(JSON.stringify(devices, (_, value: unknown) => (typeof value === 'bigint' ? Number(value) : value), 2));
      return;
    }
    const head = ['DEVICE', 'OWNER', 'ID', 'MODE', 'SIZE', 'TRANSPORT', 'READ', 'WRITTEN', 'ERRORS', 'CONFIG'];
    write(table([head, ...devices.map(row)]));
  });

program
  .command('status')
  .description('ask overlaybd-blockd whether it is well')
  .option('--socket <path>', "blockd's control socket", '/run/overlaybd-blockd/control.sock')
  .action(async (flags: SocketFlag) => {
    const status = await client(flags).status({});
    write(
      `blockd ${status.version}, pid ${status.pid}, ${status.devices} devices, transports: ${status.transports.join(', ')}`,
    );
  });

program
  .command('inspect <file>')
  .description('say what a layer file is: wrappers, kind, virtual size')
  .action(async (file: string) => {
    const info = await loadNative(nativePath()).inspectLayer(file);
    const wrapped = [info.tar ? 'tar' : '', info.zfile ? 'ZFile' : ''].filter((name) => name !== '');
    write(
      `${file}: ${info.kind}${wrapped.length > 0 ? ` in ${wrapped.join(' in ')}` : ''}, virtual size ${size(info.virtualSizeBytes)}`,
    );
  });

program
  .command('config')
  .description("look at the snapshotter's configuration")
  .command('check [file]')
  .description(`say what overlaybd-snapshotter would make of a file (default: ${kDefaultConfigPath})`)
  .option('--json', 'print every key with its value, defaults included', false)
  .action(async (file: string | undefined, flags: { readonly json: boolean }) => {
    const { config, warnings } = await loadConfig(file ?? kDefaultConfigPath);
    for (const warning of warnings) process.stderr.write(`overlaybd: ${warning}\n`);
    if (flags.json) {
      write(JSON.stringify(config, null, 2));
      return;
    }
    const rows = storesOf(config).map((store) => [store.name, store.address, store.root]);
    write(table([['STORE', 'ADDRESS', 'ROOT'], ...rows]));
  });

try {
  await program.parseAsync();
} catch (error) {
  const kind = error instanceof SnapshotterError ? ` (${error.kind})` : '';
  process.stderr.write(`overlaybd: ${error instanceof Error ? error.message : String(error)}${kind}\n`);
  process.exit(1);
}
