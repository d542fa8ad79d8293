// Generates with Go's standard library; prints the text: go run main.go [URL [MODEL [PROMPT]]]
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

func generate(url, model, prompt string) (string, error) {
	// A row has to contain every input, because REST ignores defaults.
	body, err := json.Marshal(map[string]any{
		"signature_name": "generate",
		"instances": []any{map[string]any{
			"prompt":             prompt,
			"max_new_tokens":     20,
			"temperature":        0.8,
			"top_k":              50,
			"top_p":              0.95,
			"repetition_penalty": 1.0,
			"seed":               7,
			"stop":               "",
		}},
	})
	if err != nil {
		return "", err
	}
	client := http.Client{Timeout: 120 * time.Second}
	reply, err := client.Post(url+"/v1/models/"+model+":predict", "application/json", bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	defer reply.Body.Close()
	text, err := io.ReadAll(reply.Body)
	if err != nil {
		return "", err
	}
	if reply.StatusCode != http.StatusOK {
		return "", fmt.Errorf("HTTP %d: %s", reply.StatusCode, text)
	}
	var answer struct {
		Predictions []struct {
			GeneratedText string `json:"generated_text"`
		}
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		return "", err
	}
	if len(answer.Predictions) != 1 {
		return "", fmt.Errorf("%d predictions for 1 row", len(answer.Predictions))
	}
	return answer.Predictions[0].GeneratedText, nil
}

func main() {
	given := []string{"http://localhost:8501", "quickstart", "The import statement"}
	copy(given, os.Args[1:])
	text, err := generate(given[0], given[1], given[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(text)
}
