// Runs containerd's own snapshotter conformance suite (Debian's copy of 1.6.20) against our daemon.
//
// Two targets, chosen by run.ts through the environment:
//
//	daemon      every sub-test starts its own snapshotter on a fresh root and talks to its socket directly;
//	containerd  every sub-test talks through a live containerd, in a namespace of its own.
//
// Every sub-test ends with the same demand, which the suite itself does not make: all its snapshots can be removed,
// after which nothing is mounted and no directory is left in the store.
package conformance

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/errdefs"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/namespaces"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"github.com/moby/sys/mountinfo"
	"google.golang.org/grpc"
)

// settings is what run.ts hands over in OBD_SUITE, as JSON.
type settings struct {
	// Target is "daemon" or "containerd".
	Target string `json:"target"`
	// SuiteName decides what the suite expects of Rename ("overlayfs" = no directory rename over lower layers).
	SuiteName string `json:"suiteName"`
	// Stores is the folder for the fresh roots of target "daemon" and for their logs; Sockets a short one.
	Stores  string `json:"stores"`
	Sockets string `json:"sockets"`
	// Command starts a snapshotter; "--config <file>" is appended.
	Command []string `json:"command"`
	// Config is the daemon's configuration; root and address are filled in per sub-test.
	Config map[string]interface{} `json:"config"`
	// Blockd is the control socket of the block daemon that all of them share.
	Blockd string `json:"blockd"`
	// Address and Snapshotter are containerd's socket and the plugin name, for target "containerd".
	Address     string `json:"address"`
	Snapshotter string `json:"snapshotter"`
	// Run makes names unique between repeats on one live containerd.
	Run string `json:"run"`
}

const (
	startDeadline  = 60 * time.Second
	settleDeadline = 60 * time.Second
	stopDeadline   = 30 * time.Second
)

var counter int64

func TestConformance(t *testing.T) {
	var s settings
	if err := json.Unmarshal([]byte(os.Getenv("OBD_SUITE")), &s); err != nil {
		t.Fatalf("OBD_SUITE: %v", err)
	}
	switch s.Target {
	case "daemon":
		testsuite.SnapshotterSuite(t, s.SuiteName, s.overSocket)
	case "containerd":
		testsuite.SnapshotterSuite(t, s.SuiteName, s.throughContainerd)
	default:
		t.Fatalf("unknown target %q", s.Target)
	}
}

// overSocket gives a sub-test a daemon of its own. The store lies outside `root`: on a failure the suite dumps that
// folder by reading every file whole, and deletes it across mounts.
func (s settings) overSocket(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	name := fmt.Sprintf("s%s-%d", s.Run, atomic.AddInt64(&counter, 1))
	store := filepath.Join(s.Stores, name)
	if err := os.MkdirAll(store, 0700); err != nil {
		return nil, nil, err
	}
	d, err := s.startDaemon(store, filepath.Join(s.Sockets, name))
	if err != nil {
		return nil, nil, err
	}
	conn, err := grpc.Dial("unix://"+d.address, grpc.WithInsecure(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20), grpc.MaxCallSendMsgSize(16<<20)))
	if err != nil {
		d.kill()
		return nil, nil, err
	}
	sn := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "overlaybd")
	work := filepath.Join(filepath.Dir(root), "work")
	return sn, func() error {
		defer conn.Close()
		defer d.kill()
		if err := emptyStore(ctx, sn, work); err != nil {
			return d.explain(err)
		}
		if err := s.waitUntilNothingIsLeft(d.root); err != nil {
			return d.explain(err)
		}
		if err := d.stop(); err != nil {
			return d.explain(err)
		}
		return os.RemoveAll(store)
	}, nil
}

// throughContainerd gives a sub-test a namespace of its own in the shared containerd.
func (s settings) throughContainerd(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	client, err := containerd.New(s.Address)
	if err != nil {
		return nil, nil, err
	}
	namespace := fmt.Sprintf("suite-%s-%d", s.Run, atomic.AddInt64(&counter, 1))
	sn := inNamespace{Snapshotter: client.SnapshotService(s.Snapshotter), namespace: namespace}
	work := filepath.Join(filepath.Dir(root), "work")
	return sn, func() error {
		defer client.Close()
		return emptyStore(ctx, sn, work)
	}, nil
}

// emptyStore removes every snapshot, children first, as a garbage collector would.
func emptyStore(ctx context.Context, sn snapshots.Snapshotter, work string) error {
	// A failed sub-test leaves its mounts; with them its snapshots would be busy.
	points, err := mountsBelow(work)
	if err != nil {
		return err
	}
	for _, point := range points {
		if err := mount.UnmountAll(point, 0); err != nil {
			return fmt.Errorf("unmount %s: %w", point, err)
		}
	}
	for {
		parents := map[string]bool{}
		var names []string
		if err := sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			parents[info.Parent] = true
			names = append(names, info.Name)
			return nil
		}); err != nil {
			return fmt.Errorf("list: %w", err)
		}
		if len(names) == 0 {
			break
		}
		removed := 0
		for _, name := range names {
			if parents[name] {
				continue
			}
			if err := sn.Remove(ctx, name); err != nil {
				return fmt.Errorf("remove %s: %w", name, err)
			}
			removed++
		}
		if removed == 0 {
			return fmt.Errorf("%d snapshots are all parents of each other", len(names))
		}
	}
	if c, ok := sn.(snapshots.Cleaner); ok {
		if err := c.Cleanup(ctx); err != nil && !errdefs.IsNotImplemented(err) {
			return fmt.Errorf("cleanup: %w", err)
		}
	}
	return nil
}

// waitUntilNothingIsLeft waits for the background half of Remove.
func (s settings) waitUntilNothingIsLeft(root string) error {
	deadline := time.Now().Add(settleDeadline)
	for {
		points, err := mountsBelow(root)
		if err != nil {
			return err
		}
		entries, err := os.ReadDir(filepath.Join(root, "snapshots"))
		if err != nil && !os.IsNotExist(err) {
			return err
		}
		devices, err := s.devicesOf(root)
		if err != nil {
			return err
		}
		if len(points) == 0 && len(entries) == 0 && len(devices) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			var left []string
			for _, e := range entries {
				left = append(left, e.Name())
			}
			return fmt.Errorf("left behind after removing everything: mounts %v, directories %v, devices %v",
				points, left, devices)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// devicesOf asks the block daemon which devices of this store it serves, as a person would with curl.
func (s settings) devicesOf(root string) ([]string, error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", s.Blockd)
		},
	}}
	response, err := client.Post("http://blockd/overlaybd.control.v1.BlockDaemon/ListDevices", "application/json",
		strings.NewReader("{}"))
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	defer response.Body.Close()
	var answer struct {
		Devices []struct {
			ID         string `json:"id"`
			Path       string `json:"path"`
			ConfigPath string `json:"configPath"`
		} `json:"devices"`
	}
	if err := json.NewDecoder(response.Body).Decode(&answer); err != nil {
		return nil, fmt.Errorf("list devices: %s: %w", response.Status, err)
	}
	var found []string
	for _, device := range answer.Devices {
		if strings.HasPrefix(device.ConfigPath, root+"/") {
			found = append(found, fmt.Sprintf("%s (%s)", device.ID, device.Path))
		}
	}
	return found, nil
}

// mountsBelow lists mount points under dir, deepest first.
func mountsBelow(dir string) ([]string, error) {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	var points []string
	for _, info := range infos {
		points = append(points, info.Mountpoint)
	}
	sort.Sort(sort.Reverse(sort.StringSlice(points)))
	return points, nil
}

type daemon struct {
	root, address, log string
	process            *exec.Cmd
	exited             chan error
}

func (s settings) startDaemon(store, address string) (*daemon, error) {
	d := &daemon{
		root:    filepath.Join(store, "root"),
		address: address,
		log:     filepath.Join(store, "log"),
		exited:  make(chan error, 1),
	}
	config := map[string]interface{}{}
	for key, value := range s.Config {
		config[key] = value
	}
	config["root"] = d.root
	config["address"] = d.address
	text, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	configPath := filepath.Join(store, "config.json")
	if err := os.WriteFile(configPath, text, 0600); err != nil {
		return nil, err
	}
	log, err := os.Create(d.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	args := append(append([]string{}, s.Command[1:]...), "--config", configPath)
	d.process = exec.Command(s.Command[0], args...)
	d.process.Stdout, d.process.Stderr = log, log
	// It stays in our process group, which run.ts ends when the suite does.
	if err := d.process.Start(); err != nil {
		return nil, err
	}
	go func() { d.exited <- d.process.Wait() }()
	deadline := time.Now().Add(startDeadline)
	for {
		conn, err := net.Dial("unix", d.address)
		if err == nil {
			conn.Close()
			return d, nil
		}
		select {
		case err := <-d.exited:
			return nil, d.explain(fmt.Errorf("the daemon ended before it listened: %v", err))
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			d.kill()
			return nil, d.explain(fmt.Errorf("the daemon does not listen after %s", startDeadline))
		}
	}
}

// stop demands an orderly end: SIGTERM, exit status 0.
func (d *daemon) stop() error {
	if err := d.process.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("SIGTERM: %w", err)
	}
	select {
	case err := <-d.exited:
		if err != nil {
			return fmt.Errorf("after SIGTERM: %w", err)
		}
		return nil
	case <-time.After(stopDeadline):
		d.kill()
		return fmt.Errorf("still alive %s after SIGTERM", stopDeadline)
	}
}

func (d *daemon) kill() { _ = d.process.Process.Kill() }

// explain adds the end of the daemon's log to an error.
func (d *daemon) explain(err error) error {
	text, _ := os.ReadFile(d.log)
	if len(text) > 4000 {
		text = text[len(text)-4000:]
	}
	return fmt.Errorf("%w\n--- daemon log (%s), its end:\n%s", err, d.log, text)
}

// inNamespace sends every call in one namespace, whatever the suite says.
type inNamespace struct {
	snapshots.Snapshotter
	namespace string
}

func (n inNamespace) in(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, n.namespace)
}

func (n inNamespace) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	return n.Snapshotter.Stat(n.in(ctx), key)
}

func (n inNamespace) Update(ctx context.Context, info snapshots.Info, paths ...string) (snapshots.Info, error) {
	return n.Snapshotter.Update(n.in(ctx), info, paths...)
}

func (n inNamespace) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	return n.Snapshotter.Usage(n.in(ctx), key)
}

func (n inNamespace) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	return n.Snapshotter.Mounts(n.in(ctx), key)
}

func (n inNamespace) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return n.Snapshotter.Prepare(n.in(ctx), key, parent, opts...)
}

func (n inNamespace) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return n.Snapshotter.View(n.in(ctx), key, parent, opts...)
}

func (n inNamespace) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	return n.Snapshotter.Commit(n.in(ctx), name, key, opts...)
}

func (n inNamespace) Remove(ctx context.Context, key string) error {
	return n.Snapshotter.Remove(n.in(ctx), key)
}

func (n inNamespace) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return n.Snapshotter.Walk(n.in(ctx), fn, filters...)
}
