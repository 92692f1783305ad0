// The Vercel AI SDK through the local proxy: only the base URL is ours.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { streamText } from "ai";

const { VOUCHSAFE_PROXY = "http://127.0.0.1:8080", VOUCHSAFE_API_KEY, VOUCHSAFE_MODEL } = process.env;
const question = process.argv.slice(2).join(" ") || "What can the host see?";
const service = createOpenAICompatible({
  name: "vouchsafe",
  baseURL: `${VOUCHSAFE_PROXY}/v1`,
  apiKey: VOUCHSAFE_API_KEY,
});

try {
  const { textStream } = streamText({
    model: service(VOUCHSAFE_MODEL),
    prompt: question,
    temperature: 0,
    onError: ({ error }) => { throw error; }, // without it streamText swallows errors and the text merely ends
  });
  for await (const text of textStream) process.stdout.write(text);
  console.log();
} catch (error) {
  console.error(`error: ${error.message}`);
  process.exitCode = 1;
}
