package hsrpc

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	_ "google.golang.org/grpc/balancer/roundrobin" // registers round_robin, which serviceConfig names
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

// The attempts of serviceConfig's retryPolicy; gRPC allows no more than five.
const (
	maxAttempts       = 5
	initialBackoff    = 100 * time.Millisecond
	maxBackoff        = 5 * time.Second
	backoffMultiplier = 2
)

// serviceConfig has all addresses of the target take turns, and calls that met a busy or absent server tried again.
var serviceConfig = fmt.Sprintf(`{
	"loadBalancingConfig": [{"round_robin": {}}],
	"methodConfig": [{
		"name": [{"service": "hsrpc.v1.GenerationService"}, {"service": "hsrpc.v1.ModelService"},
			{"service": "hsrpc.v1.ServerService"}],
		"retryPolicy": {"maxAttempts": %d, "initialBackoff": "%gs", "maxBackoff": "%gs", "backoffMultiplier": %d,
			"retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]}
	}]
}`, maxAttempts, initialBackoff.Seconds(), maxBackoff.Seconds(), backoffMultiplier)

// retryBuffer is the largest request in bytes that is kept for another attempt: as large as servers take them.
const retryBuffer = 4 << 20

var (
	// A vanished server is noticed within 40 s. Servers take a ping every ten seconds.
	keepaliveParameters = keepalive.ClientParameters{
		Time: 30 * time.Second, Timeout: 10 * time.Second, PermitWithoutStream: true,
	}
	// A server that is back is found within about a second, and at once by a call.
	connectParameters = grpc.ConnectParams{
		Backoff: backoff.Config{
			BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second,
		},
		MinConnectTimeout: 10 * time.Second,
	}
)

// Option says how a client reaches its server.
type Option func(*connection)

type connection struct {
	usesTLS        bool
	caFile         string
	certFile       string
	keyFile        string
	credentials    credentials.TransportCredentials
	hasToken       bool
	token          string
	plaintextToken bool
	timeout        time.Duration
	withoutRetries bool
	extra          []grpc.DialOption
}

// WithTLS encrypts the connection. The server's certificate must come from a root in caFile, in PEM; "" stands for the
// roots that the system trusts.
func WithTLS(caFile string) Option {
	return func(c *connection) { c.usesTLS, c.caFile = true, caFile }
}

// WithClientCertificate shows the client's own certificate, of files in PEM, to servers that ask for one. It implies
// TLS.
func WithClientCertificate(certFile, keyFile string) Option {
	return func(c *connection) { c.usesTLS, c.certFile, c.keyFile = true, certFile, keyFile }
}

// WithTransportCredentials takes credentials of your own, in place of WithTLS and WithClientCertificate.
func WithTransportCredentials(own credentials.TransportCredentials) Option {
	return func(c *connection) { c.credentials = own }
}

// WithToken sends "authorization: Bearer TOKEN" with every call. It needs TLS.
func WithToken(token string) Option {
	return func(c *connection) { c.hasToken, c.token = true, token }
}

// AllowPlaintextToken lets the token of WithToken travel unencrypted, where nobody else can read the network.
func AllowPlaintextToken() Option {
	return func(c *connection) { c.plaintextToken = true }
}

// WithTimeout sets how long a call may take whose context has no deadline. Default: any time. Streams of the generated
// stubs are left alone.
func WithTimeout(timeout time.Duration) Option {
	return func(c *connection) { c.timeout = timeout }
}

// WithoutRetries makes each call once, for those who have a way of their own to try again.
func WithoutRetries() Option {
	return func(c *connection) { c.withoutRetries = true }
}

// WithDialOptions adds options of gRPC, which win over those of this package.
func WithDialOptions(options ...grpc.DialOption) Option {
	return func(c *connection) { c.extra = append(c.extra, options...) }
}

func (c *connection) dialOptions() ([]grpc.DialOption, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	transport, err := c.transport()
	if err != nil {
		return nil, err
	}
	options := []grpc.DialOption{
		transport,
		grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithDisableServiceConfig(), // that is: no look-up of TXT records, which no server of hsrpc needs
		grpc.WithKeepaliveParams(keepaliveParameters),
		grpc.WithConnectParams(connectParameters),
		grpc.WithDefaultCallOptions(grpc.MaxRetryRPCBufferSize(retryBuffer)),
		grpc.WithChainUnaryInterceptor(unaryCall(c.timeout)),
		grpc.WithChainStreamInterceptor(streamCall),
	}
	if c.hasToken {
		options = append(options, grpc.WithPerRPCCredentials(bearer{c.token, !c.plaintextToken}))
	}
	switch {
	case c.withoutRetries:
		options = append(options, grpc.WithDisableRetry())
	case !retriesByItself(grpc.Version):
		options = append(options, retrying()...)
	}
	return append(options, c.extra...), nil
}

func (c *connection) check() error {
	switch {
	case c.credentials != nil && c.usesTLS:
		return errors.New("hsrpc: transport credentials: given together with TLS files; give one of them")
	case (c.certFile == "") != (c.keyFile == ""):
		return fmt.Errorf("hsrpc: client certificate %q, key %q: one without the other; give both", c.certFile, c.keyFile)
	case c.hasToken && !isPrintable(c.token):
		return errors.New("hsrpc: token: empty, or not printable ASCII; give the token alone, without a newline")
	case c.hasToken && !c.usesTLS && c.credentials == nil && !c.plaintextToken:
		return errors.New("hsrpc: token: it would travel unencrypted; add WithTLS, or AllowPlaintextToken where nobody " +
			"else can read the network")
	case c.timeout < 0:
		return fmt.Errorf("hsrpc: timeout %v: negative; give a time to wait, or 0 for any time", c.timeout)
	}
	return nil
}

func (c *connection) transport() (grpc.DialOption, error) {
	if c.credentials != nil {
		return grpc.WithTransportCredentials(c.credentials), nil
	}
	if !c.usesTLS {
		return grpc.WithInsecure(), nil // not insecure.NewCredentials, which releases before 1.34 do not have
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.caFile != "" {
		pem, err := os.ReadFile(c.caFile)
		if err != nil {
			return nil, fmt.Errorf("hsrpc: CA file: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("hsrpc: CA file %q: has no certificate; give one in PEM", c.caFile)
		}
	}
	if c.certFile != "" {
		pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
		if err != nil {
			return nil, fmt.Errorf("hsrpc: client certificate %q, key %q: %w", c.certFile, c.keyFile, err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return grpc.WithTransportCredentials(credentials.NewTLS(config)), nil
}

// resolvable has the name looked up here, so that all of its addresses are known to round_robin.
func resolvable(target string) string {
	if target == "" {
		target = DefaultTarget
	}
	for _, scheme := range []string{"dns:", "unix:", "unix-abstract:", "passthrough:", "xds:"} {
		if strings.HasPrefix(target, scheme) {
			return target
		}
	}
	if strings.Contains(target, "://") {
		return target
	}
	return "dns:///" + target
}

func isPrintable(text string) bool {
	for _, character := range text {
		if character < ' ' || character > '~' {
			return false
		}
	}
	return text != ""
}

// bearer is a token for every call.
type bearer struct {
	token  string
	secure bool
}

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + b.token}, nil
}

func (b bearer) RequireTransportSecurity() bool {
	return b.secure
}
