package io.github.hsrpc;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertThrows;
import static org.junit.Assert.assertTrue;

import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.GeneralSecurityException;
import java.security.KeyFactory;
import java.security.KeyPair;
import java.security.KeyPairGenerator;
import java.security.PrivateKey;
import java.security.interfaces.ECPrivateKey;
import java.security.spec.PKCS8EncodedKeySpec;
import java.util.Arrays;
import java.util.Base64;
import org.junit.Test;

/** Keys in the forms that tools write. */
public final class PrivateKeyFileTest {
    /** Bytes of PKCS #8 in front of what it holds of an RSA key of 2048 bits, and of a key of P-256. */
    private static final int RSA_HEADER = 26;
    private static final int EC_HEADER = 28;
    /** Bytes of a public key of P-256 in front of the BIT STRING. */
    private static final int PUBLIC_HEADER = 23;
    /** What SEC 1 says of the curve P-256, and Java does not, since PKCS #8 has said it. */
    private static final byte[] P256 = {(byte) 0xa0, 10, 6, 8, 0x2a, (byte) 0x86, 0x48, (byte) 0xce, 0x3d, 3, 1, 7};

    @Test
    public void pkcs8IsTakenAsItIs() throws Exception {
        PrivateKey key = generate("EC", 256).getPrivate();
        assertEquals(key, read("EC", pem("PRIVATE KEY", key.getEncoded())));
    }

    @Test
    public void pkcs1IsTaken() throws Exception {
        PrivateKey key = generate("RSA", 2048).getPrivate();
        byte[] inside = Arrays.copyOfRange(key.getEncoded(), RSA_HEADER, key.getEncoded().length);
        assertEquals(key, read("RSA", pem("RSA PRIVATE KEY", inside)));
    }

    @Test
    public void sec1IsTakenAlsoBehindParameters() throws Exception {
        KeyPair pair = generate("EC", 256);
        byte[] key = pair.getPrivate().getEncoded();
        byte[] point = pair.getPublic().getEncoded();
        ByteArrayOutputStream fields = new ByteArrayOutputStream();
        fields.write(key, EC_HEADER + 2, key.length - EC_HEADER - 2);
        fields.writeBytes(P256);
        fields.write(0xa1);
        fields.write(point.length - PUBLIC_HEADER);
        fields.write(point, PUBLIC_HEADER, point.length - PUBLIC_HEADER);
        ByteArrayOutputStream sec1 = new ByteArrayOutputStream();
        sec1.write(0x30);
        sec1.write(fields.size());
        sec1.writeBytes(fields.toByteArray());
        String parameters = pem("EC PARAMETERS", Arrays.copyOfRange(P256, 2, P256.length));
        PrivateKey read = read("EC", parameters + pem("EC PRIVATE KEY", sec1.toByteArray()));
        assertEquals(((ECPrivateKey) pair.getPrivate()).getS(), ((ECPrivateKey) read).getS());
    }

    @Test
    public void anotherFileNamesItselfAndTheRemedy() throws Exception {
        byte[] bytes = {1, 2, 3};
        for (String text : new String[] {
            "", pem("CERTIFICATE", bytes), pem("ENCRYPTED PRIVATE KEY", bytes), pem("EC PRIVATE KEY", bytes),
            pem("DSA PRIVATE KEY", bytes)
        }) {
            IllegalArgumentException error = assertThrows(text, IllegalArgumentException.class, () -> read("EC", text));
            String expected = "tlsCertificate: .*key.*\\.pem .*openssl pkcs8.*";
            assertTrue(error.getMessage(), error.getMessage().matches(expected));
        }
    }

    private static KeyPair generate(String algorithm, int bits) throws GeneralSecurityException {
        KeyPairGenerator generator = KeyPairGenerator.getInstance(algorithm);
        generator.initialize(bits);
        return generator.generateKeyPair();
    }

    private static String pem(String kind, byte[] bytes) {
        String body = Base64.getMimeEncoder().encodeToString(bytes);
        return "-----BEGIN " + kind + "-----\n" + body + "\n-----END " + kind + "-----\n";
    }

    /** The key that Java finds in what a file with this text is read as. */
    private static PrivateKey read(String algorithm, String text) throws IOException, GeneralSecurityException {
        Path file = Files.createTempFile("key", ".pem");
        try {
            Files.writeString(file, text);
            String pem = new String(PrivateKeyFile.read(file).readAllBytes(), StandardCharsets.US_ASCII);
            byte[] key = Base64.getMimeDecoder().decode(pem.replaceAll("-----[^-]*-----", ""));
            return KeyFactory.getInstance(algorithm).generatePrivate(new PKCS8EncodedKeySpec(key));
        } finally {
            Files.delete(file);
        }
    }
}
