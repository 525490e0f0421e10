// Command example streams a continuation: example [HOST:PORT] [PROMPT].
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	hsrpc "github.com/hsrpc/hsrpc/clients/go"
)

func main() {
	target, prompt := hsrpc.DefaultTarget, "Once upon a time"
	if len(os.Args) > 1 {
		target = os.Args[1]
	}
	if len(os.Args) > 2 {
		prompt = os.Args[2]
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, target, prompt); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, target, prompt string) error {
	client, err := hsrpc.NewClient(target)
	if err != nil {
		return err
	}
	defer client.Close()
	stream := client.Generate(ctx, hsrpc.Text(prompt), hsrpc.MaxTokens(64))
	defer stream.Close()
	for stream.Next() {
		fmt.Print(stream.Text())
	}
	fmt.Println()
	if err := stream.Err(); errors.Is(err, context.Canceled) {
		return nil // Ctrl-C: the server has stopped the work
	} else if err != nil {
		return err
	}
	finish := stream.Finish()
	fmt.Printf("[%v, %d tokens]\n", finish.GetReason(), finish.GetUsage().GetCompletionTokens())
	return nil
}
